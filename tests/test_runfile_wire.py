"""What goes into the shared memory comes out of it, and nothing unread is written over."""

from __future__ import annotations

import json
import mmap
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normuon_lens.hooks import feed as feed_module
from normuon_lens.hooks.feed import Feed, FeedLost
from normuon_lens.runfile import wire

SIZE = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[mmap.mmap]:
    descriptor, memory = wire.create_memory(SIZE)
    os.close(descriptor)
    yield memory
    memory.close()


def array_strategy() -> st.SearchStrategy[np.ndarray]:
    dtypes = st.sampled_from(["f2", "f4", "f8", ">f4", "i1", "u8", "i8", "?", "c8"])
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
    return dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes))


@settings(deadline=None)
@given(
    arrays=st.dictionaries(st.text(max_size=8), array_strategy(), max_size=4),
    header=st.dictionaries(st.text(), st.none() | st.integers() | st.floats() | st.text()),
    lines=st.integers(0, 99),
)
def test_message_comes_out_as_it_went_in(
    memory: mmap.mmap, arrays: dict[str, np.ndarray], header: dict[str, Any], lines: int
) -> None:
    offset = 64 * lines
    encoded = wire.encode_header("kind", header, arrays)
    length = wire.write_message(memory, offset, encoded, arrays)
    assert length <= wire.message_size(encoded, arrays)
    message = wire.read_message(memory, offset)
    assert message.kind == "kind"
    assert repr(message.header) == repr(header), "NaN and infinity included"
    assert list(message.arrays) == list(arrays)
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array, strict=True)


def test_views_of_any_layout_are_sent_by_value(memory: mmap.mmap) -> None:
    whole = np.arange(48.0).reshape(6, 8)
    arrays = {"transposed": whole.T, "strided": whole[::2, ::-3], "broadcast": whole[:, :1] + 0}
    wire.write_message(memory, 0, wire.encode_header("x", {}, arrays), arrays)
    for name, array in wire.read_message(memory, 0).arrays.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_message_is_a_copy_that_outlives_the_memory(memory: mmap.mmap) -> None:
    arrays = {"x": np.ones(9)}
    wire.write_message(memory, 0, wire.encode_header("x", {}, arrays), arrays)
    message = wire.read_message(memory, 0)
    memory[:4096] = b"\xff" * 4096
    np.testing.assert_array_equal(message.arrays["x"], 1)


def test_message_fills_the_memory_to_its_last_byte() -> None:
    arrays = {"x": np.arange(50, dtype=np.int16), "nothing": np.empty((0, 3))}
    encoded = wire.encode_header("x", {}, arrays)
    descriptor, memory = wire.create_memory(wire.message_size(encoded, arrays))
    os.close(descriptor)
    wire.write_message(memory, 0, encoded, arrays)
    np.testing.assert_array_equal(wire.read_message(memory, 0).arrays["x"], np.arange(50))


def test_memory_that_is_not_to_be_had_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Cannot allocate"):
        wire.create_memory(SIZE)
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- the ring ------------------------------------------------------------------------------------


class StubHelper:
    """Stands in for the helper process, and takes messages only when it is told to."""

    def __init__(self, command: list[str], *, pass_fds: tuple[int], **_: Any) -> None:
        self._memory = mmap.mmap(pass_fds[0], int(command[-1]))
        self._orders, to = os.pipe()
        of, self._answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(to, "wb", 0), os.fdopen(of, "rb", 0)
        self.pid = self.returncode = 0

    def take(self) -> wire.Message:
        offset, _, position = wire.PLACE.unpack(os.read(self._orders, wire.PLACE.size))
        message = wire.read_message(self._memory, offset)
        self.answer(ack=position)
        return message

    def answer(self, **answer: Any) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def die(self) -> None:
        for descriptor in (self._orders, self._answers):
            os.close(descriptor)

    def wait(self, timeout: float) -> int:
        return -9


CAPACITY = 4096


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Feed, StubHelper]]:
    monkeypatch.setattr(feed_module.subprocess, "Popen", StubHelper)
    feed, helper = start()
    yield feed, helper
    feed.close()


def start() -> tuple[Feed, StubHelper]:
    feed = Feed(CAPACITY)
    helper = feed._process
    assert isinstance(helper, StubHelper)
    return feed, helper


TAKE = -1


@settings(deadline=None, max_examples=200)
@given(actions=st.lists(st.integers(0, CAPACITY) | st.just(TAKE), max_size=60))
def test_ring_never_writes_over_what_is_unread(actions: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module.subprocess, "Popen", StubHelper)
        feed, helper = start()
    sent: deque[tuple[int, np.ndarray]] = deque()

    def take() -> None:
        number, values = sent.popleft()
        message = helper.take()
        assert message.header == {"number": number}
        np.testing.assert_array_equal(message.arrays["values"], values)

    for number, action in enumerate(actions):
        if action == TAKE:
            if sent:
                take()
            continue
        values = np.full(action, number, np.uint8)
        if feed.send("x", {"number": number}, {"values": values}):
            sent.append((number, values))
        else:
            assert sent or action > CAPACITY / 2 - 200, "refused though there was room"
    while sent:
        take()
    helper.die()
    feed.close()


def test_ring_is_used_to_the_full_and_again(stub: tuple[Feed, StubHelper]) -> None:
    feed, helper = stub
    values = {"x": np.zeros(CAPACITY // 8 - 200, np.uint8)}
    for _ in range(5):
        taken = 0
        while feed.send("x", {}, values):
            taken += 1
        assert taken >= 8
        for _ in range(taken):
            helper.take()


@pytest.mark.parametrize(
    "size",
    [
        CAPACITY // 3,
        CAPACITY - 300,
    ],
)
def test_what_fits_at_all_is_accepted_once_the_ring_is_empty(
    size: int, stub: tuple[Feed, StubHelper]
) -> None:
    feed, helper = stub
    for number in range(9):
        assert feed.send("small", {}, {"x": np.zeros(100 * number)[:60]})
        helper.take()
        assert feed.send("large", {}, {"x": np.zeros(size, np.uint8)}), number
        helper.take()


def test_what_can_never_fit_is_refused_even_when_waiting(stub: tuple[Feed, StubHelper]) -> None:
    feed, _ = stub
    assert not feed.send("x", {}, {"x": np.zeros(CAPACITY, np.uint8)}, wait=True)


def test_answers_come_in_pieces_and_are_kept(stub: tuple[Feed, StubHelper]) -> None:
    feed, helper = stub
    os.write(helper._answers, b'{"ack":0}\n{"flus')
    feed.poll()
    os.write(helper._answers, b'hed": 7}\n')
    feed.poll()
    assert feed.answers == {"flushed": 7}


def test_error_and_death_of_the_helper_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module.subprocess, "Popen", StubHelper)
    feed, helper = start()
    helper.answer(error="No space left on device")
    with pytest.raises(FeedLost, match="No space left"):
        feed.send("x", {})
    helper.die()
    with pytest.raises(FeedLost, match="ended with exit code -9"):
        feed.send("x", {})
    feed.close()
