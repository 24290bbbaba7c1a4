"""Large pages: what is in them stays as it is."""

import numpy as np

from service.engine.pages import enlarge_pages, large_pages


def test_memory_keeps_what_it_holds() -> None:
    numbers = np.arange(4_000_000)
    assert enlarge_pages(large_pages()) >= 0
    assert (numbers == np.arange(4_000_000)).all()
