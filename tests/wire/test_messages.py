from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotport.errors import ControlError
from hotport.options import Options
from hotport.wire import messages
from hotport.wire.messages import WorkerSpec, decode, encode, parse_worker_socket, worker_socket

#: The closed sets, one a direction of each conversation.
SETS: dict[str, Any] = {
    "order": messages.Order,
    "word": messages.Word,
    "request": messages.Request,
    "reply": messages.Reply,
}
KINDS: dict[str, tuple[Any, type[msgspec.Struct]]] = {
    f"{name}-{kind.__name__}": (kinds, kind) for name, kinds in SETS.items() for kind in get_args(kinds)
}

#: As workers and supervisors of older versions say them.
STORED: dict[str, list[dict[str, Any]]] = msgspec.json.decode(Path(__file__).with_name("messages.json").read_bytes())

# JSON has neither NaN nor infinity; the integers are those that msgspec itself accepts.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(int, st.integers(-(2**63), 2**64 - 1))


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Every value of a message, from the types of its fields."""
    return st.builds(kind, **{field.name: strategy(field.type) for field in msgspec.structs.fields(kind)})


def strategy(type_: Any) -> st.SearchStrategy[Any]:
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return structs(type_)
    if nested := [arg for arg in get_args(type_) if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]:
        if type_ == tuple[nested[0], ...]:  # type: ignore[valid-type]
            return st.lists(structs(nested[0]), max_size=3).map(tuple)
        return st.none() | structs(nested[0])
    return st.from_type(type_)


@pytest.mark.parametrize(("kinds", "kind"), KINDS.values(), ids=KINDS)
@settings(max_examples=50)
@given(data=st.data())
def test_what_is_said_is_what_is_heard_also_by_an_older_version(
    kinds: Any, kind: type[msgspec.Struct], data: st.DataObject
) -> None:
    message = data.draw(structs(kind))
    heard = decode(encode(message), kinds)
    assert heard == message
    assert type(heard) is kind
    newer = {**msgspec.json.decode(encode(message)), "said_since_version_2": [1, {"a": None}]}
    assert decode(msgspec.json.encode(newer), kinds) == message


@pytest.mark.parametrize("name", STORED)
def test_what_an_older_version_says_is_understood(name: str) -> None:
    """After an upgrade a supervisor hears older workers: a field that is added needs a default."""
    assert {said["type"] for said in STORED[name]} == {kind.__struct_config__.tag for kind in get_args(SETS[name])}
    for said in STORED[name]:
        heard = msgspec.json.decode(encode(decode(msgspec.json.encode(said), SETS[name])))
        assert heard.items() >= said.items()


@given(st.builds(WorkerSpec, options=st.builds(Options, bind=st.lists(st.text()).map(tuple), settle_s=st.floats(0, 9))))
def test_worker_hears_its_options_as_they_are(spec: WorkerSpec) -> None:
    assert decode(encode(spec), WorkerSpec) == spec


@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
@given(payload=st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused(kinds: Any, payload: bytes) -> None:
    with pytest.raises(ControlError, match="HP602"):
        decode(payload, kinds)


@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_what_is_no_message_is_refused(kinds: Any) -> None:
    for payload in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"type":1}',
        b'{"type":"\xff"}',
        b"\xff\xfe",
        b'{"type":null}',
        b"[" * 60_000,
    ):
        with pytest.raises(ControlError, match="HP602"):
            decode(payload, kinds)


@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_unknown_message_is_refused_by_name(kinds: Any) -> None:
    with pytest.raises(ControlError, match="HP602") as caught:
        decode(b'{"type":"fly"}', kinds)
    assert "'fly'" in caught.value.cause


def test_message_of_another_conversation_is_refused_by_name() -> None:
    with pytest.raises(ControlError, match="HP602") as caught:
        decode(encode(messages.StopRequest(now=True)), messages.Order)
    assert "'stop'" in caught.value.cause


@pytest.mark.parametrize("payload", [b'{"type":"scale"}', b'{"type":"scale","workers":"2"}'])
def test_missing_or_mistyped_field_is_refused_by_name(payload: bytes) -> None:
    with pytest.raises(ControlError, match="HP602") as caught:
        decode(payload, messages.Request)
    assert "workers" in caught.value.cause


def test_refusal_quotes_no_more_than_the_beginning() -> None:
    with pytest.raises(ControlError, match="HP602") as caught:
        decode(b"x" * 100_000, messages.Request)
    assert len(caught.value.cause) < 200


@pytest.mark.parametrize("kinds", SETS.values(), ids=SETS)
def test_tags_are_told_apart_within_a_conversation(kinds: Any) -> None:
    tags = [kind.__struct_config__.tag for kind in get_args(kinds)]
    assert len(set(tags)) == len(tags)


def test_name_of_a_workers_socket_says_whose_it_is() -> None:
    assert parse_worker_socket(worker_socket(12, 3)) == (12, 3)
    for other in ("control.sock", "worker-12.sock", "worker-a.b.sock", "../worker-1.2.sock", "worker-1.2.sock.old"):
        assert parse_worker_socket(other) is None


def test_path_of_a_workers_socket_says_whose_it_is() -> None:
    own, users = worker_socket(12, 3), f"{messages.user_directory(33)}/{worker_socket(12, 3)}"
    for path in (own, users):
        assert messages.parse_worker_path(path) == (12, 3)
    for other in ("a/worker-1.2.sock", "user-x/worker-1.2.sock", "../worker-1.2.sock", "user-1/user-2/worker-1.2.sock"):
        assert messages.parse_worker_path(other) is None
    assert messages.user_of_socket(f"/run/hotport/svc/{own}") is None
    assert messages.user_of_socket(f"/run/hotport/svc/{users}") == 33
    assert messages.user_of_socket("@name") is None
    assert (messages.notify_socket(None), messages.notify_socket(33)) == ("notify.sock", "notify-33.sock")


def test_workers_of_a_user_hand_connections_to_each_other_alone() -> None:
    own, one, two = (f"/run/svc/{place}worker-1.1.sock" for place in ("", "user-1/", "user-2/"))
    assert messages.may_hand_to(own, own)
    assert messages.may_hand_to(own, one)
    assert messages.may_hand_to(one, one)
    assert not messages.may_hand_to(one, two)
    assert not messages.may_hand_to(one, own)
