"""Base models: loading, tokenising, paged attention and the adapted linear. Knows no requests and no adapter files."""
