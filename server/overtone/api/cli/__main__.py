"""`python -m overtone.api.cli` is `overtone`."""

from overtone.api.cli import main

main()
