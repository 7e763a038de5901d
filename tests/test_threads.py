"""How many threads torch's operations take, by the thread that calls them."""

from concurrent.futures import ThreadPoolExecutor

import torch

from fedsim.threads import one_thread, take_threads


def test_what_others_set_changes_no_threads_number() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=take_threads, initargs=(1,)) as pool:
        pool.submit(int).result()  # the thread lives, and has done no operation yet
        torch.set_num_threads(2)
        try:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


def test_one_thread_is_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
