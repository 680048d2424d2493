"""The page allocator against a set of free pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.pages import PageAllocator

# Positive: allocate that many; otherwise free the (-n)-th of what is allocated.
actions = st.lists(st.integers(-6, 6), max_size=60)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(total=st.integers(1, 12), actions=actions)
def test_against_a_set(total: int, actions: list[int]) -> None:
    allocator = PageAllocator(total, page_tokens=4)
    free, held = set(range(1, total + 1)), []
    for action in actions:
        if action >= 0:
            assert allocator.can_allocate(action) == (action <= len(free))
            if action <= len(free):
                pages = allocator.allocate(action)
                assert len(pages) == len(set(pages)) == action
                assert set(pages) <= free
                free -= set(pages)
                held.append(pages)
        elif held:
            pages = held.pop(-action % len(held))
            allocator.free(pages)
            free |= set(pages)
        assert allocator.used == total - len(free)
    for pages in held:
        allocator.free(pages)
    # Nothing was lost on the way: all pages but page 0 can be had again.
    assert sorted(allocator.allocate(total)) == list(range(1, total + 1))
    assert not allocator.can_allocate(1)


@given(tokens=st.integers(0, 1000), page_tokens=st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_pages_for(tokens: int, page_tokens: int) -> None:
    pages = PageAllocator(1, page_tokens).pages_for(tokens)
    assert (pages - 1) * page_tokens < tokens <= pages * page_tokens or pages == tokens == 0


def test_freeing_twice_is_noticed() -> None:
    allocator = PageAllocator(3, page_tokens=4)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(KeyError):
        allocator.free(pages)


def test_freeing_page_zero_is_noticed() -> None:
    with pytest.raises(KeyError):
        PageAllocator(3, page_tokens=4).free([0])


def test_allocating_too_many_is_noticed() -> None:
    with pytest.raises(AssertionError):
        PageAllocator(3, page_tokens=4).allocate(4)
