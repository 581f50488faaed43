"""What hypothesis makes the structures of a store of."""

from __future__ import annotations

from hypothesis import strategies as st

from dirtmap.fmt import store
from dirtmap.fmt.store import Area


def numbers(size: int) -> st.SearchStrategy[int]:
    """Unsigned numbers of that many bytes, the outermost often."""
    most = 256**size - 1
    return st.sampled_from([0, 1, most - 1, most]) | st.integers(0, most)


areas = st.builds(Area, numbers(8), numbers(4), numbers(4))


others = st.lists(
    st.tuples(numbers(4).filter(lambda kind: kind and kind not in store.EXTENSION_NAMES), st.binary(max_size=200)),
    max_size=4,
)
