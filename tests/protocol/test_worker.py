"""What agent and trainer say to each other."""

import math

import msgspec
import pytest

from protocol.failures import FailureReason, failure
from protocol.worker import (
    AnyEvent,
    AnyOrder,
    Failed,
    Metrics,
    Numbered,
    Parameters,
    SetParameters,
    Start,
    encoder,
    event_decoder,
    order_decoder,
)
from tests.protocol.golden import EVENTS, ORDERS


def test_every_order_and_event_has_an_example() -> None:
    assert {type(order) for order in ORDERS.values()} == set(AnyOrder.__args__)
    assert {type(event) for event in EVENTS.values()} == set(AnyEvent.__args__)


@pytest.mark.parametrize("union", [AnyOrder, AnyEvent])
def test_tags_are_small_numbers_each_used_once(union: AnyOrder | AnyEvent) -> None:
    tags = [member.__struct_config__.tag for member in union.__args__]
    assert sorted(tags) == list(range(1, len(tags) + 1))


def test_both_ways_there_is_no_loss() -> None:
    for order in ORDERS.values():
        assert order_decoder.decode(encoder.encode(order)) == order
    for event in EVENTS.values():
        numbered = Numbered(2, 7, event)
        assert event_decoder.decode(encoder.encode(numbered)) == numbered


def test_a_loss_that_is_no_number_travels_as_it_is() -> None:
    event = Metrics(1, 0.5, 3.0, {"train_loss": math.nan, "grad_norm": math.inf})
    heard = event_decoder.decode(encoder.encode(Numbered(1, 1, event))).event
    assert isinstance(heard, Metrics)
    assert math.isnan(heard.values["train_loss"])
    assert heard.values["grad_norm"] == math.inf


def test_a_pickle_is_no_event() -> None:
    with pytest.raises(msgspec.DecodeError):
        event_decoder.decode(b"\x80\x04\x95.")


def test_a_newer_trainer_may_append_fields() -> None:
    body = msgspec.msgpack.encode([1, 1, [9, msgspec.to_builtins(failure(FailureReason.DATA, "x")), "more"]])
    assert isinstance(event_decoder.decode(body).event, Failed)


def test_none_leaves_a_parameter_as_it_is() -> None:
    order = SetParameters(Parameters(learning_rate=1e-5))
    assert b"batch_size" not in encoder.encode(order)


def test_a_start_says_where_events_go_on() -> None:
    start = ORDERS["Start"]
    assert isinstance(start, Start)
    assert start.first_event == 3
