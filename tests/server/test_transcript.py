"""Tokens become text: whole characters, nothing of a stop string, every token with the text it began."""

from hypothesis import given
from hypothesis import strategies as st

from perigee.server.transcript import Piece, StopFinder, Transcript
from perigee.workers.engine.sequence import FinishReason, Token
from perigee.workers.model.tokenizer import Tokenizer

small_text = st.text(alphabet="abé", max_size=12)
small_stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text(alphabet="abé", max_size=3)), stops=small_stops)
def test_text_in_pieces_is_cut_where_a_search_would_cut_it(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    sent, came = "", ""
    for piece in pieces:
        came += piece
        text, stopped = finder.feed(piece)
        sent += text
        found = [came.find(stop) for stop in stops if stop in came]
        assert stopped == bool(found)
        if found:
            assert sent == came[: min(found)]
            return
        assert came.startswith(sent)
        held = came[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    assert sent + finder.flush() == came


def feed_all(transcript: Transcript, token_ids: list[int], reason: FinishReason) -> list[Piece]:
    pieces = []
    for index, token_id in enumerate(token_ids):
        last = index == len(token_ids) - 1
        piece = transcript.feed(Token(token_id, -1.0), reason if last else FinishReason.NOT_FINISHED)
        pieces.append(piece)
        if piece.finish_reason is not None:
            break
    return pieces


@given(
    text=small_text.filter(bool), stops=small_stops.filter(lambda stops: len(stops) < 2), min_tokens=st.integers(0, 2)
)
def test_tokens_and_text_of_a_transcript_agree(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    token_ids = tokenizer.encode(text)
    pieces = feed_all(Transcript(0, tokenizer, [], stops, min_tokens), token_ids, FinishReason.LENGTH)
    sent = "".join(piece.text for piece in pieces)
    placed = [token for piece in pieces for token in piece.tokens]
    assert text.startswith(sent)
    assert [token.token.token for token in placed] == token_ids[: len(placed)]
    assert all(token.offset < len(sent) for token in placed)
    if not min_tokens:
        cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert sent == text[:cut]


def test_an_output_of_halves_of_characters_is_marked_as_such(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("東")
    pieces = feed_all(Transcript(0, tokenizer, [], [], 0), token_ids[:-1], FinishReason.LENGTH)
    assert "".join(piece.text for piece in pieces) == "\ufffd"
    assert [len(piece.tokens) for piece in pieces] == [0] * (len(token_ids) - 2) + [len(token_ids) - 1]


def test_the_token_that_stops_has_no_text_even_if_it_is_no_special_one(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("ab.")
    pieces = feed_all(Transcript(0, tokenizer, [], [], 0), token_ids, FinishReason.STOP)
    assert "".join(piece.text for piece in pieces) == "ab"
    assert pieces[-1].finish_reason == "stop"
