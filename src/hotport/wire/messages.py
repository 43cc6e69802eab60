"""Control messages, as they travel in frames (`hotport.wire.frames`).

Three conversations use them. The supervisor connects to a worker's control socket and gives orders; the worker
answers with what has become true. A command connects to the supervisor's control socket, sends one request, and
reads progress until the conversation ends with a `Report`, a `Status`, a `TlsReport`, a `Done` or a `Failure`.

Each conversation has a closed set of messages; anything else is refused by name. Unknown fields are ignored, so a
newer side may say more than an older one understands. A field that is added has a default: after ``hotport
upgrade`` a supervisor hears workers of an older version (``tests/wire/messages.json`` has what they say). One that
cannot have a default makes `PROTOCOL` grow.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from hotport.errors import ControlError
from hotport.options import Options
from hotport.options.definition import LogLevel

__all__ = [
    "COUNTERS",
    "LOAD_PAGE",
    "PROTOCOL",
    "TEMPLATE",
    "decode",
    "encode",
    "may_hand_to",
    "notify_socket",
    "parse_user_directory",
    "parse_worker_path",
    "parse_worker_socket",
    "user_directory",
    "user_of_socket",
    "worker_socket",
]

#: What the page in which workers see each other's load is called among the descriptors that a worker is started with.
LOAD_PAGE: Final = "load"

#: The name of the page in which a worker counts, likewise.
COUNTERS: Final = "counters"

#: The name of a template's socket among its descriptors.
TEMPLATE: Final = "template"

#: Grows when a message changes its meaning.
PROTOCOL: Final = 1


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know at its start, as JSON in ``HOTPORT_WORKER``."""

    service: str
    directory: str
    generation: int
    worker: int
    options: Options


# -- supervisor <-> template --------------------------------------------------------------------------------


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """From a template: it has imported the application, or could not."""

    error: str = ""


class ForkOrder(msgspec.Struct, frozen=True, kw_only=True):
    """To a template: fork a worker, which gets the descriptors of this message.

    Attributes:
        names: A name for each descriptor, as in ``LISTEN_FDNAMES``.
    """

    spec: WorkerSpec
    names: tuple[str, ...]


class Forked(msgspec.Struct, frozen=True, kw_only=True):
    """From a template: the worker, with its pidfd; or why there is none."""

    pid: int = 0
    error: str = ""


# -- supervisor -> worker -----------------------------------------------------------------------------------


class AcceptOrder(msgspec.Struct, frozen=True, kw_only=True, tag="accept"):
    """Accept connections, for the first time or again."""


class QuiesceOrder(msgspec.Struct, frozen=True, kw_only=True, tag="quiesce"):
    """Stop accepting; keep every connection.

    Attributes:
        empties: Take what waits in the accept queue first, and keep taking late ones: new clients are sent elsewhere.
    """

    empties: bool = False


class DrainOrder(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """Finish the connections within `timeout_s` and leave; if `is_last`, empty the accept queue first.

    Attributes:
        successors: Control sockets of workers that can go on with connections.
    """

    timeout_s: float
    is_last: bool = False
    successors: tuple[str, ...] = ()


class HurryOrder(msgspec.Struct, frozen=True, kw_only=True, tag="hurry"):
    """Cut the open connections, report them, and leave now."""


class SuccessorsOrder(msgspec.Struct, frozen=True, kw_only=True, tag="successors"):
    """To a worker that drains or is quiesced: these workers can take its connections from now on."""

    successors: tuple[str, ...]


class OfferOrder(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """From another worker, not from the supervisor: take my connections.

    After the `Welcome` this connection carries `hotport.wire.envelope` frames, and no messages any more.

    Attributes:
        sender: The name of its own control socket, as in `ExpectOrder`.
    """

    version: int
    sender: str = ""


class ExpectOrder(msgspec.Struct, frozen=True, kw_only=True, tag="expect"):
    """Keep room for connections of workers that are about to leave, until these say themselves how many come.

    Attributes:
        connections: How many by the name of the worker's control socket; 0: none any more.
    """

    connections: dict[str, int]


class InspectOrder(msgspec.Struct, frozen=True, kw_only=True, tag="inspect"):
    """Report your state; if `is_watched`, also how long your event loop was blocked since the last inspection."""

    is_watched: bool = False


class ListenOrder(msgspec.Struct, frozen=True, kw_only=True, tag="listen"):
    """Listen on your control socket again, if its file is not there any more."""


class ReloadTlsOrder(msgspec.Struct, frozen=True, kw_only=True, tag="reload_tls"):
    """Read the certificates again, for connections from now on."""


class LogLevelOrder(msgspec.Struct, frozen=True, kw_only=True, tag="log_level"):
    """Log this level and those above it from now on."""

    level: LogLevel


class RebalanceOrder(msgspec.Struct, frozen=True, kw_only=True, tag="rebalance"):
    """Hand connections to workers of your generation with fewer."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """State of a supervisor that the next one could not learn from workers; each worker keeps a copy.

    Attributes:
        wanted: How many workers should serve.
        generations: How many generation numbers have been given out.
        spawned: How many worker numbers.
        favoured: The generation that should go on if several serve whole.
    """

    wanted: int
    generations: int
    spawned: int
    favoured: int = 0


class RememberOrder(msgspec.Struct, frozen=True, kw_only=True, tag="remember"):
    """Keep this for the next supervisor."""

    memory: Memory


class ListenersOrder(msgspec.Struct, frozen=True, kw_only=True, tag="listeners"):
    """Send back duplicates of your listeners, with `Listening`; this connection ends with it."""


class TransferOrder(msgspec.Struct, frozen=True, kw_only=True, tag="transfer"):
    """Take listeners, and connections that were accepted from the queue of older ones.

    After the `Welcome` they come as descriptors, in this order, and nothing else comes on this connection any more. The
    answer is `Transferred`. A worker that accepts already accepts from them at once.

    Attributes:
        addresses: One for each listener.
        connections: How many connections come after the listeners.
    """

    addresses: tuple[str, ...]
    connections: int = 0


class ReleaseOrder(msgspec.Struct, frozen=True, kw_only=True, tag="release"):
    """Empty the accept queues of these addresses and close their listeners; keep every connection.

    Attributes:
        timeout_s: When to close a listener whose queue cannot be emptied: a worker may be out of descriptors.
    """

    addresses: tuple[str, ...]
    timeout_s: float = 1.0


class ProbeOrder(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """Request `path` from your application by HTTP, and report the outcome within `timeout_s`."""

    path: str
    timeout_s: float


Order = (
    AcceptOrder
    | QuiesceOrder
    | DrainOrder
    | HurryOrder
    | SuccessorsOrder
    | OfferOrder
    | ExpectOrder
    | InspectOrder
    | ListenOrder
    | ReloadTlsOrder
    | LogLevelOrder
    | RebalanceOrder
    | RememberOrder
    | ListenersOrder
    | TransferOrder
    | ReleaseOrder
    | ProbeOrder
)


# -- worker -> supervisor -----------------------------------------------------------------------------------


class Import(msgspec.Struct, frozen=True, kw_only=True):
    """A module that was imported in `ms` milliseconds from `at_s` on (CLOCK_MONOTONIC, seconds).

    Attributes:
        own_ms: Without the modules that it imported itself.
    """

    name: str
    at_s: float
    ms: float
    own_ms: float


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message on every connection to a worker.

    Attributes:
        phase: ``starting``, ``ready``, ``serving``, ``quiesced`` or ``draining``.
        memory: What its supervisor left with it.
        stack: The descriptor and the inode of the pipe for its Python stacks (`hotport.kernel.stacks`).
        imports: The slowest modules of its application.
    """

    protocol: int = PROTOCOL
    pid: int
    service: str
    generation: int
    worker: int
    phase: str = "starting"
    memory: Memory | None = None
    stack: tuple[int, int] | None = None
    imports: tuple[Import, ...] = ()


class Accepting(msgspec.Struct, frozen=True, kw_only=True, tag="accepting"):
    """Connections are being accepted since `at_s` (CLOCK_MONOTONIC, seconds).

    Attributes:
        fates: What became of connections while none were accepted, from a worker that had been quiesced.
    """

    at_s: float
    fates: dict[str, int] = {}


class Quiesced(msgspec.Struct, frozen=True, kw_only=True, tag="quiesced"):
    """No connection is accepted since `at_s` (CLOCK_MONOTONIC, seconds)."""

    at_s: float


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The answer to an offer: how many connections may come by now, and how many there are; why none ever may."""

    room: int
    connections: int = 0
    why: str = ""


class Expired(msgspec.Struct, frozen=True, kw_only=True, tag="expired"):
    """This worker has reached a recycling limit."""

    why: str


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Batches of connections that another worker has taken, from `at_s` on (CLOCK_MONOTONIC, seconds).

    Attributes:
        to: The name of its control socket.
        ms: From the first offer to the last acknowledgement.
    """

    at_s: float
    ms: float
    to: str
    connections: int
    batches: int = 1


class Drained(msgspec.Struct, frozen=True, kw_only=True, tag="drained"):
    """Every connection has ended; how many with which fate, counted since draining began; and when they moved."""

    fates: dict[str, int]
    moves: tuple[Move, ...] = ()


class Lingering(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that a draining worker waits for: its peer, kind and age, and why it is still open."""

    peer: str
    kind: str
    age_s: float
    why: str


class Inspection(msgspec.Struct, frozen=True, kw_only=True, tag="inspection"):
    """The state of a worker.

    Attributes:
        lingering: The oldest connections of one that drains.
        errors: Requests that failed: answers of 5xx, and those that were broken off.
        timeouts: Those of them that have taken longer than ``request_timeout``.
        lag_s: How long its event loop was held up at most since it was last asked, if it was asked for that.
        log_dropped: Lines of its log that could not be written.
        cuts: Connections that it has cut, by fate.
    """

    connections: int
    accepted: int
    adopted: int = 0
    lingering: tuple[Lingering, ...] = ()
    requests: int
    rss_bytes: int
    errors: int = 0
    timeouts: int = 0
    lag_s: float = 0.0
    log_dropped: int = 0
    cuts: dict[str, int] = {}


class TlsReloaded(msgspec.Struct, frozen=True, kw_only=True, tag="tls_reloaded"):
    """The certificates were read again; with an `error` they cannot be used, and those from before are kept."""

    error: str = ""


class Rebalanced(msgspec.Struct, frozen=True, kw_only=True, tag="rebalanced"):
    """So many connections have moved."""

    moved: int


class Listening(msgspec.Struct, frozen=True, kw_only=True, tag="listening"):
    """Duplicates of the listeners of these addresses come with this message.

    Attributes:
        has_page: The last descriptor is that of the page in which workers of this generation see each other's load.
    """

    addresses: tuple[str, ...]
    has_page: bool = False


class Released(msgspec.Struct, frozen=True, kw_only=True, tag="released"):
    """No listener of these addresses is open here any more, since `at_s` (CLOCK_MONOTONIC, seconds)."""

    addresses: tuple[str, ...]
    at_s: float


class Transferred(msgspec.Struct, frozen=True, kw_only=True, tag="transferred"):
    """So many descriptors have arrived."""

    count: int


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed"):
    """The outcome of a probe: `why` it failed, or nothing."""

    why: str = ""


Word = (
    Hello
    | Accepting
    | Quiesced
    | Welcome
    | Expired
    | Drained
    | Inspection
    | TlsReloaded
    | Rebalanced
    | Listening
    | Released
    | Transferred
    | Probed
)


# -- command -> supervisor ----------------------------------------------------------------------------------


class RestartRequest(msgspec.Struct, frozen=True, kw_only=True, tag="restart"):
    """Restart; what is not None overrides the service's own option."""

    phased: bool | None = None
    strategy: str | None = None
    canary: int | None = None
    bake_s: float | None = None
    undo_window_s: float | None = None


class StatusRequest(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Describe the service."""


class StopRequest(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """End the service, at once or after draining.

    Attributes:
        lame_duck_s: Seconds to serve on before it drains; None leaves it to the service's own option.
    """

    now: bool = False
    lame_duck_s: float | None = None


class ScaleRequest(msgspec.Struct, frozen=True, kw_only=True, tag="scale"):
    """Run `workers` workers from now on."""

    workers: int


class RebalanceRequest(msgspec.Struct, frozen=True, kw_only=True, tag="rebalance"):
    """Share the open connections among the workers as evenly as can be."""


class ReloadTlsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="reload_tls"):
    """Let every worker read its certificates again."""


class LogLevelRequest(msgspec.Struct, frozen=True, kw_only=True, tag="log_level"):
    """Log this level and those above it in all processes, until the next restart."""

    log_level: LogLevel


class UndoRequest(msgspec.Struct, frozen=True, kw_only=True, tag="undo"):
    """Take the old generation back; or, to `keep` the new one, end the bake or the undo window."""

    keep: bool = False


class UpgradeRequest(msgspec.Struct, frozen=True, kw_only=True, tag="upgrade"):
    """Become another supervisor of the same workers: by another interpreter, or by this one with new code."""

    python: str | None = None


class TakeOverRequest(msgspec.Struct, frozen=True, kw_only=True, tag="take_over"):
    """From another supervisor: give me your listeners. `HandOver` comes back, and `TakenOver` is awaited."""

    protocol: int = PROTOCOL
    version: str


Request = (
    RestartRequest
    | StatusRequest
    | StopRequest
    | ScaleRequest
    | ReloadTlsRequest
    | LogLevelRequest
    | RebalanceRequest
    | UpgradeRequest
    | TakeOverRequest
    | UndoRequest
)


class TakenOver(msgspec.Struct, frozen=True, kw_only=True, tag="committed"):
    """The workers of the supervisor that takes over accept.

    Attributes:
        workers: Paths of their control sockets in the service's runtime directory.
        addresses: What they listen on.
    """

    workers: tuple[str, ...]
    addresses: tuple[str, ...]


# -- supervisor -> command ----------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Progress of a request; `ms` since it was accepted."""

    event: str
    ms: float
    generation: int = 0
    worker: int = 0
    detail: str = ""


class PhaseTime(msgspec.Struct, frozen=True, kw_only=True):
    """When a restart reached a phase, in milliseconds from its request; a phased one has a batch for each worker."""

    name: str
    ms: float
    batch: int = 1


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """One restart, whole.

    Attributes:
        outcome: ``"done"``, ``"aborted"`` before the new generation had taken over, or ``"undone"`` after it.
        serving: The generation that serves now.
        error: Why it was aborted or undone, and who asked for it; in the failed worker's own words where it left any.
        accept_gap_ms: How long no worker accepted; 0 if the generations overlapped. Connections made in it wait
            in the accept queue, they are not refused.
        connections: What became of the old generation's connections once it accepted no more, by fate; None for a
            foreign program, which keeps its own.
        connections_back: What became of the new generation's connections, if it was undone, or aborted when some of
            its workers had begun to serve.
        start_cpu_s: Seconds of processor time until the new workers were ready, with their template's.
        dropped: Connections, or datagrams, that the kernel has dropped meanwhile at this service's listeners: their
            queues were full.
        strategy: How the listeners reached the new generation.
        rebind_gap_us: With *rebind*: microseconds without a listener; None with the others.
        refused: With *rebind*: connections that were refused in the gap: the segments with RST that the kernel sent
            meanwhile (``OutRsts`` in ``/proc/net/snmp``, whole network namespace), less `reset`.
        reset: With *rebind*: connections that waited in the accept queue when it was closed, or that nobody could be
            given.
    """

    service: str
    generation: int
    previous: int
    outcome: str
    serving: int
    error: str = ""
    is_phased: bool = False
    began_at: str = ""
    phases: tuple[PhaseTime, ...] = ()
    accept_gap_ms: float = 0.0
    connections: dict[str, int] | None = None
    connections_back: dict[str, int] | None = None
    start_cpu_s: float = 0.0
    dropped: int = 0
    strategy: str = "inherit"
    rebind_gap_us: float | None = None
    refused: int | None = None
    reset: int | None = None


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as the supervisor sees it. Public on the status port, unless `statusport.public` empties it.

    Attributes:
        log_dropped: Lines of its log that could not be written.
        timeouts: Requests that have taken longer than ``request_timeout``.
        cuts: Connections that it has cut, by fate.
        lag_s: How long its event loop was blocked at most in the last minute; None if that is not known.
        hung_s: How long it has not answered, if it hangs.
        hung_at: Where it hangs: a line of the application, or why that is not known.
        stack: The Python stacks of its threads, when it was found to hang.
        is_stopped: A signal or a debugger has stopped it.
    """

    worker: int
    generation: int
    pid: int
    phase: str
    age_s: float
    status: str = ""
    connections: int | None = None
    accepted: int | None = None
    adopted: int | None = None
    requests: int | None = None
    rss_bytes: int | None = None
    lingering: tuple[Lingering, ...] = ()
    log_dropped: int | None = None
    timeouts: int | None = None
    cuts: dict[str, int] = {}
    lag_s: float | None = None
    hung_s: float | None = None
    hung_at: str = ""
    stack: str = ""
    is_stopped: bool = False


class WatchStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A restart that can be undone: which, what ends in `left_s` seconds (``"baking"``, ``"watching"``)."""

    generation: int
    step: str
    left_s: float


class Mishap(msgspec.Struct, frozen=True, kw_only=True):
    """Bad news at a time (``time.time()``), without the words of the application, which may be secret."""

    at: float
    event: str
    generation: int
    worker: int
    why: str


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """The state of the service. Public on the status port, unless `statusport.public` empties it.

    Attributes:
        stage: ``"starting"``, ``"ready"``, ``"unserved"``, ``"lame duck"`` or ``"stopping"``.
        lame_duck_left_s: How long a lame duck serves on.
        status_address: Where the status port is; empty without one.
        strategy: How listeners reach the next generation, and why in this way.
        strategies: Every strategy, and why it cannot work here; empty if it can.
        lost: Addresses that another process has taken, and which; binding them is retried.
        gone: Addresses whose socket file was removed or replaced, and why it could not be made again.
        log_dropped: Lines of the supervisor's log that could not be written.
        queues: How many connections wait to be accepted, by TCP address.
        mishaps: The last bad news, oldest first.
    """

    service: str
    pid: int
    version: str
    generation: int
    wanted: int
    restarting: int
    addresses: tuple[str, ...]
    target: str
    age_s: float
    rss_bytes: int
    workers: tuple[WorkerStatus, ...]
    last_restart: Report | None = None
    stage: str = ""
    lame_duck_left_s: float | None = None
    status_address: str = ""
    strategy: str = "inherit"
    strategy_why: str = ""
    strategies: dict[str, str] = {}
    lost: dict[str, str] = {}
    gone: dict[str, str] = {}
    watch: WatchStatus | None = None
    log_dropped: int = 0
    queues: dict[str, int] = {}
    mishaps: tuple[Mishap, ...] = ()


class WorkerTls(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of reloading certificates in one worker.

    Attributes:
        outcome: ``"reloaded"``; ``"starting"``, which reads them before it accepts; or ``"kept"`` those from before.
        error: Why they were kept, as an error is shown.
    """

    worker: int
    generation: int
    pid: int
    outcome: str
    error: str = ""


class TlsReport(msgspec.Struct, frozen=True, kw_only=True, tag="tls_report"):
    """The outcome of reloading certificates in every worker."""

    service: str
    workers: tuple[WorkerTls, ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The request was carried out."""

    detail: str = ""
    exit_code: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """The request was refused or failed: an error's fields."""

    code: str
    what: str
    cause: str
    fix: str
    exit_code: int
    note: str = ""

    def error(self) -> ControlError:
        """Make the error that the client raises; its exit code is the one that the service chose."""
        error = ControlError(self.code, self.what, cause=self.cause, fix=self.fix, note=self.note)
        error.exit_code = self.exit_code  # type: ignore[misc]
        return error


class HandOver(msgspec.Struct, frozen=True, kw_only=True, tag="estate"):
    """To a supervisor that takes over. With it come the lock of the runtime directory and the listeners.

    Attributes:
        bind: The addresses as the options name them.
        addresses: What they are, in the order of the descriptors.
        status_bind: Of the status port, if there is one: its descriptor is the last.
        status_address: What that is.
    """

    version: str
    memory: Memory
    bind: tuple[str, ...]
    addresses: tuple[str, ...]
    status_bind: str = ""
    status_address: str = ""


Reply = Progress | Report | Status | TlsReport | Done | Failure | HandOver

T = TypeVar("T")

_WORKER_SOCKET: Final = re.compile(r"worker-(\d+)\.(\d+)\.sock")
_USER_DIRECTORY: Final = re.compile(r"user-(\d{1,10})")

_encoder = msgspec.json.Encoder()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def worker_socket(generation: int, worker: int) -> str:
    """Return the name of a worker's control socket in the service's runtime directory."""
    return f"worker-{generation}.{worker}.sock"


def parse_worker_socket(name: str) -> tuple[int, int] | None:
    """Parse generation and worker from the name of a control socket; None for any other name."""
    found = _WORKER_SOCKET.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def user_directory(uid: int) -> str:
    """Return the name of the directory, in that of the service, for the control sockets of another user's workers."""
    return f"user-{uid}"


def parse_user_directory(name: str) -> int | None:
    """Parse the user from the name of its directory; None for any other name."""
    found = _USER_DIRECTORY.fullmatch(name)
    return int(found[1]) if found else None


def notify_socket(uid: int | None) -> str:
    """Return the name of the socket that workers notify, in the service's directory; `uid`: another user's workers."""
    return "notify.sock" if uid is None else f"notify-{uid}.sock"


def user_of_socket(path: str) -> int | None:
    """Return whose worker listens on a control socket, by the directory it is in; None: the service's own user."""
    return parse_user_directory(path.rpartition("/")[0].rpartition("/")[2])


def may_hand_to(old: str, new: str) -> bool:
    """Whether a worker can hand connections to another, by the paths of their control sockets.

    Workers of another user reach only each other; those of the service's own user reach all.
    """
    user = user_of_socket(old)
    return user is None or user_of_socket(new) == user


def parse_worker_path(path: str) -> tuple[int, int] | None:
    """Parse generation and worker from a control socket's path in the service's directory; None for any other path."""
    place, _, name = path.rpartition("/")
    return None if place and parse_user_directory(place) is None else parse_worker_socket(name)


def encode(message: msgspec.Struct) -> bytes:
    """Encode one message as JSON."""
    return _encoder.encode(message)


def decode(payload: bytes, kind: Any) -> Any:
    """Decode one message of the closed set `kind`, for example ``Order``.

    Raises:
        ControlError: It is not JSON, not one of the set, or a field has the wrong type (HP602).
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # the last one: [[[[...
        raise ControlError(
            "HP602",
            "cannot understand a control message",
            cause=f"{error}; it begins {payload[:60]!r}",
            fix="hotport --version",
            note="use the same hotport version on both sides of a control socket",
        ) from None
