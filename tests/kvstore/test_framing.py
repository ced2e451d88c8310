import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.framing import MAX_FRAME_BYTES, FrameReader, frame


@given(st.lists(st.binary(min_size=1, max_size=40)), st.integers(1, 50))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(bodies: list[bytes], piece: int) -> None:
    stream = b"".join(frame(body) for body in bodies)
    reader = FrameReader()
    pieces = [stream[start : start + piece] for start in range(0, len(stream), piece)]
    assert [body for data in pieces for body in reader.feed(data)] == bodies


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_that_no_message_has_is_malformed(length: int) -> None:
    with pytest.raises(MalformedFrame, match=f"frame of {length} bytes"):
        list(FrameReader().feed(length.to_bytes(4, "little")))
