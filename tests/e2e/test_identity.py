"""The first promise: greedy tokens equal those of the base model with the adapter's dense delta merged in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.reference import MergedReference
from support.server import ThreadServer
from support.traffic import Ask, ask_all, make_adapters

WORDS = [
    "the",
    "sea",
    "and",
    "the",
    "wind",
    "tell",
    "an",
    "old",
    "story",
    "of",
    "ships",
    "that",
    "never",
    "came",
    "home",
    "again",
    "to",
    "the",
    "quiet",
    "harbour",
]


def asks(adapters: list[str], count: int, new_tokens: int) -> list[Ask]:
    """Mixed: every third request has no adapter, lengths differ, one adapter is used twice, arrivals are spread."""
    result = []
    for i in range(count):
        adapter = None if i % 3 == 2 else adapters[i % len(adapters)]
        prompt = " ".join(WORDS[: 2 + (5 * i) % len(WORDS)]) + f" {i}"
        result.append(Ask(prompt, adapter, new_tokens, delay_s=0.05 * (i % 5)))
    return result


def load_all(server: ThreadServer, adapters: dict[str, Path]) -> None:
    with server.client() as client:
        for adapter_id, folder in adapters.items():
            client.adapters.load(folder, id=adapter_id)


def check_mixed_batch(
    server: ThreadServer, reference: MergedReference, adapters: dict[str, Path], new_tokens: int
) -> None:
    load_all(server, adapters)
    batch = asks(list(adapters), 16, new_tokens)
    together = ask_all(server.address, batch)
    with server.client() as client:
        digests = {adapter_id: client.adapters.get(adapter_id).digest for adapter_id in adapters}
        prompts = [client.tokenize(ask.prompt).token_ids for ask in batch]
    by_adapter: dict[str | None, set[tuple[int, ...]]] = {}
    for ask, answer, prompt_ids in zip(batch, together, prompts, strict=True):
        folder = adapters[ask.adapter] if ask.adapter else None
        expected = reference.greedy(folder, prompt_ids, new_tokens)
        assert answer.token_ids == expected, f"{ask.adapter}: {ask.prompt!r}"
        assert answer.adapter_digest == (digests[ask.adapter] if ask.adapter else "")
        assert answer.usage.prompt_tokens == len(prompt_ids)
        by_adapter.setdefault(ask.adapter, set()).add(tuple(answer.token_ids))
    # The test would be empty if the adapters changed nothing.
    base_only = reference.greedy(None, prompts[0], new_tokens)
    assert together[0].token_ids != base_only


def test_tiny_mixed_batch_equals_merged_weights(
    tiny_server: ThreadServer, tiny_reference: MergedReference, tmp_path: Path
) -> None:
    modules = tiny_server.base.modules
    assert any(p != q for p, q in modules.values())
    adapters = make_adapters(tmp_path / "made", modules, 7, n=40, strength=0.8)
    check_mixed_batch(tiny_server, tiny_reference, adapters, 16)


@pytest.mark.timeout(1200)
def test_demo_mixed_batch_equals_merged_weights(
    demo_server: ThreadServer, demo_reference: MergedReference, tmp_path: Path
) -> None:
    modules = {n: s for n, s in demo_server.base.modules.items() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    adapters = make_adapters(tmp_path, modules, 7, n=300, strength=0.3)
    check_mixed_batch(demo_server, demo_reference, adapters, 24)


def test_tokens_do_not_change_with_neighbours(demo_server: ThreadServer, tmp_path: Path) -> None:
    modules = {n: s for n, s in demo_server.base.modules.items() if n.endswith(("q_proj", "v_proj"))}
    adapters = make_adapters(tmp_path, modules, 6)
    load_all(demo_server, adapters)
    probes = [Ask("A base-only row among adapters: the answer is", None), Ask("Once upon a time", "loca-0")]
    alone = [ask_all(demo_server.address, [probe])[0] for probe in probes]
    crowd = [Ask(f"{' '.join(WORDS[:i])} and then", name, 32) for i, name in enumerate(adapters, 2)]
    for neighbours in (crowd, crowd[:2], [Ask(p.prompt, "sdctft-1") for p in probes]):
        answers = ask_all(demo_server.address, [*neighbours[:1], *probes, *neighbours[1:]])
        for probe, expected in zip(probes, alone, strict=True):
            same = [
                a for a, ask in zip(answers, [*neighbours[:1], *probes, *neighbours[1:]], strict=True) if ask is probe
            ]
            assert same[0].token_ids == expected.token_ids
            assert same[0].text == expected.text
