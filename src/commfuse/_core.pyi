"""The C++ core: windows, counters, keys and rows of bytes.

It links nothing of torch and knows nothing of experts: it is given addresses (plain ints), sizes in bytes and integer keys. Whoever calls
it owns the meaning. Sizes and offsets that other processes wrote are checked against their windows before use; addresses and sizes
that the caller passes for its own memory are trusted.

How the pieces fit, for one group:

1. ``arena = Arena(max_bytes, control_bytes)``, once in a process; ``arena.grow(n)`` as slabs are needed.
2. ``offset = arena.make_control(group_id, header_bytes, depth)`` and ``door = Door(arena)``; the ranks exchange ``door.name``,
   ``offset`` and one secret token by the group's store.
3. ``peers = door.exchange(rank, names, token, timeout_s)``; ``channel = Channel(arena, peers, offsets, rank, group_id)``; then one
   agreement over the store (or ``post``) before the first operation, and before a group is dropped.
4. Operation ``s`` (1, 2, 3, ... in every rank's order)::

       channel.wait(CONSUMED, s - depth)             # the ring slot is free
       ... write data into slabs of the arena ...
       offer.set_segment(0, address, num_bytes)      # up to NUM_SEGMENTS pieces of the arena
       channel.publish(s, offer)
       channel.wait(PUBLISHED, s)                    # everybody's data is there
       channel.resolve(s, offer)                     # same operation everywhere? where are the pieces?
       ... read channel.sources(0) by KeySort, TermPlan, or by address ...
       channel.advance(CONSUMED, s)                  # the others may reuse what they published

A slab that was published by operation ``s`` is free when ``channel.reached(CONSUMED, s)``.

Nothing is thread-safe beyond what a function says: one thread at a time for each object. Functions that loop or wait release the GIL.
In a forked child every object made before the fork refuses its use with ``CoreError``; of the windows only what
`Arena.show_to_children` has named is mapped there.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, final, overload

import torch

TOKEN_BYTES: Final[int]
"""Length of the secret of ``Door.exchange``."""
PAGE_BYTES: Final[int]
"""Granule of ``populate`` and ``punch``, and what the sizes of an arena must be multiples of."""
NUM_SEGMENTS: Final[int]
"""Pieces of memory that one publication may name."""
POST_BYTES: Final[int]
"""Longest message of ``Channel.post``."""
RECORD_BYTES: Final[int]
"""Bytes of each header slot that the core itself uses; the rest is the body of an ``Offer``."""

PUBLISHED: Final[int]
"""Counter: operations whose publication can be read."""
CONSUMED: Final[int]
"""Counter: operations of which the rank has finished every read of its peers."""
POSTED: Final[int]
"""Counter: messages on the rank's board."""
PROGRESS: Final[int]
"""Counter: where the rank is, in the caller's own code; for messages about it."""

OK: Final[int]
"""Status of a wait: everything has arrived. 0."""
DEAD: Final[int]
"""Status of a wait: the member has ended without what was awaited."""
DEADLINE: Final[int]
"""Status of a wait: the time is up; the member is the first that is missing."""
POISONED: Final[int]
"""Status of a wait: some rank has given the group up; see ``Channel.cause``."""

BF16: Final[int]
FP16: Final[int]
F32: Final[int]

TERM_NOTHING: Final[int]
"""Kind of a term: no summand."""
TERM_ROW: Final[int]
"""Kind of a term: a row of the sum's dtype."""
TERM_F32_ROW: Final[int]
"""Kind of a term: a float32 row."""

KEY_OUT_OF_RANGE: Final[int]
KEY_DUPLICATE: Final[int]

FAULT_KEY: Final[int]
"""``TermPlan.run``: a key that no member owns."""
FAULT_COUNT: Final[int]
"""``TermPlan.run``: the owner's counts leave no row for this pair."""
FAULT_TAG: Final[int]
"""``TermPlan.run``: the owner's tag at this place names another pair."""
FAULT_BOUNDS: Final[int]
"""``TermPlan.run``: the row or its tag lies beyond what the owner has published."""
FAULT_REST: Final[int]
"""``TermPlan.run``: the owner holds rows for this rank that no pair takes."""

class CoreError(RuntimeError):
    """A size, an offset or a state that the core refuses; nothing has been changed unless the function says so."""

class CoreMemoryError(CoreError):
    """Memory, address space or a limit does not suffice. Raised before a page is touched."""

def available_memory() -> int:
    """Bytes that may still be allocated: MemAvailable, or what the memory cgroups above this process leave, if that is less."""

class Window:
    """A mapped arena, of this process or of a peer: control blocks in ``[0, control_bytes)``, slabs behind them."""

    @property
    def address(self) -> int:
        """Where it is mapped in this process; constant for its life. Raises CoreError in a forked child."""
    @property
    def max_bytes(self) -> int:
        """Reserved address space."""
    @property
    def control_bytes(self) -> int:
        """Bytes of the control part."""
    @property
    def size(self) -> int:
        """Bytes of the file now; grows only. A peer's growth is seen without a message."""
    def at(self, offset: int, num_bytes: int) -> int:
        """Address of a range of the slab part. Raises CoreError when it does not lie inside the file."""
    def prefault_read(self, offset: int, num_bytes: int) -> None:
        """Map the pages of a range here and now, so that later reads do not fault. Holes become zero pages of their owner: use it
        for ranges that hold data. Best effort; raises CoreError when the range does not lie inside the file.
        """

@final
class Arena(Window):
    """The memory of this process that peers may map: a memfd, nothing in any file system, gone with its last user.

    Supports the buffer protocol over all of ``max_bytes`` (``torch.frombuffer(arena, dtype=...)``); such views keep it mapped.
    Bytes at or behind ``size`` must not be touched.
    """

    def __init__(self, max_bytes: int, control_bytes: int) -> None:
        """Reserve ``max_bytes`` of addresses, of which ``control_bytes`` are for control blocks (a few KiB a group).

        Both are multiples of PAGE_BYTES. Raises CoreError when the addresses or the memfd are refused.
        """
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def grow(self, num_bytes: int) -> None:
        """Make the file at least ``num_bytes`` long (rounded up to pages). Touches no page, changes no address.

        Raises CoreMemoryError beyond ``max_bytes``.
        """
    def populate(self, offset: int, num_bytes: int) -> None:
        """Allocate and map the pages of a range for writing; content that is there stays.

        Cheap (0.2 us) where it was done before. Raises CoreMemoryError, with nothing touched, when ``limit_bytes`` or the memory of
        the machine or cgroup would be exceeded.
        """
    def punch(self, offset: int, num_bytes: int) -> None:
        """Give the whole pages (PAGE_BYTES) inside a range back to the system. They read as zeros, here and in every peer."""
    def show_to_children(self, offset: int, num_bytes: int) -> None:
        """Let children that are forked from now on share a range with this process; the rest is not mapped in them."""
    @overload
    def allocated_bytes(self) -> int:
        """Bytes of memory that the arena holds."""
    @overload
    def allocated_bytes(self, offset: int, num_bytes: int) -> int:
        """Bytes of a range that hold pages, whoever touched them."""
    def offset_of(self, address: int, num_bytes: int) -> int:
        """Offset of a range given by address. Raises CoreError when it does not lie in the slabs of this arena."""
    limit_bytes: int
    """What ``populate`` may bring ``allocated_bytes()`` to. Default: ``max_bytes``."""
    def make_control(self, group_id: int, header_bytes: int, depth: int) -> int:
        """Make this rank's control block of a group; returns its offset, for the others' ``Channel``.

        ``group_id``: 64 bits, the same on all ranks, new for every group. ``header_bytes``: of one publication, a multiple of 128,
        RECORD_BYTES of it are the core's. ``depth``: operations that may be published and not consumed, 1 to 1024.
        A block is used again when its Channel is gone here and at every living peer. Raises CoreMemoryError when none is left.
        """

@final
class Peer(Window):
    """A peer process and its arena, mapped read-only but for the control part. Made by ``Door.exchange``."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def pid(self) -> int:
        """Its process id as seen from here; 0 from another pid namespace."""
    @property
    def alive(self) -> bool:
        """False once the process has ended (zombies count as ended). Microseconds."""

@final
class Door:
    """Where the ranks of one group on this host meet, once: an abstract unix socket."""

    def __init__(self, arena: Arena) -> None:
        """Start listening on a fresh name."""
    @property
    def name(self) -> str:
        """What the other ranks need to find it."""
    def exchange(self, rank: int, names: Sequence[str], token: bytes, timeout_s: float) -> list[Peer | None]:
        """Swap arenas with all other ranks; collective. Entry ``rank`` of the result is None.

        ``names``: every rank's door, by rank. ``token``: TOKEN_BYTES secret bytes that only the group's ranks know. Processes of
        other users, and those without the token, are turned away. Peers met before (in another group) come back as the same object.
        ``timeout_s``: negative for none. Raises CoreError naming the ranks that did not come, and what a signal handler raises.
        """

@final
class Sources:
    """One range of memory for each active member, in their order: where they keep one kind of data of an operation."""

    def __init__(self, num_sources: int) -> None: ...
    def __len__(self) -> int: ...
    def set(self, source: int, address: int, num_bytes: int) -> None:
        """Name a range by hand (own memory, tests); it must stay valid while it is used."""
    def address(self, source: int) -> int:
        """Where it begins; 0 when the member published nothing."""
    def num_bytes(self, source: int) -> int:
        """How long it is."""

@final
class Offer:
    """What a rank publishes: pieces of its arena, and a body of bytes. Reusable for every call of one shape."""

    def __init__(self) -> None: ...
    def set_body(self, body: bytes, agreed_bytes: int) -> None:
        """The header's content; its first ``agreed_bytes`` must be equal on all ranks. At most header_bytes - RECORD_BYTES."""
    def set_segment(self, index: int, address: int, num_bytes: int) -> None:
        """Piece ``index`` lies at ``address`` in the own arena; 0 bytes for none. Checked by ``publish``."""

@final
class Channel:
    """One group on this host: its counters, publications and poison word, seen from one rank."""

    def __init__(self, arena: Arena, peers: Sequence[Window | None], offsets: Sequence[int], index: int, group_id: int) -> None:
        """``peers[i]``, ``offsets[i]``: window and control block of member i; the window of ``index`` itself is None.

        Raises CoreError when a block is not of this group or was made with other sizes.
        """
    @property
    def num_members(self) -> int: ...
    @property
    def index(self) -> int: ...
    active: list[int]
    """Members that take part, in the order of ``Sources``; contains ``index``. All of them at first. Setting it empties Sources."""
    spin_ns: int
    """How long a wait spins before it sleeps. 50000 at first; choose a few thousand when ranks outnumber cores."""
    slice_ns: int
    """Longest time between two looks at peers, poison, deadline and signals. 20 ms at first."""
    waited_ns: list[int]
    """For each member, nanoseconds from the start of each wait until its counter was there, added up. May be set."""
    epoch: int
    """16 bits; poison of older epochs is not heeded."""
    @property
    def moved_ns(self) -> int:
        """Time in which repeated calls have written, copied and summed rows, added up."""
    def publish(self, sequence: int, offer: Offer) -> None:
        """Write the header, then raise PUBLISHED to ``sequence``: all that was written before is visible to who has seen it.

        Raises CoreError, with nothing published, when ``sequence`` is not new, the ring slot is not yet consumed by every active
        member (wait for CONSUMED >= sequence - depth), the body is too long, or a segment does not lie in the arena.
        Sequences need not be consecutive: after a loss, survivors may agree on a larger one and ``advance`` both counters.
        """
    def advance(self, line: int, value: int) -> None:
        """Raise an own counter and wake its waiters. Raises CoreError when it would go back."""
    def wait(self, line: int, target: int, timeout_s: float = -1.0, heed_poison: bool = True) -> int:
        """Wait until the counter of every other active member is at least ``target``.

        Returns 0, or status | member << 8. Does not raise, except what a signal handler raises (Ctrl-C, within a slice).
        Everything a member wrote before it raised the counter is visible after 0.
        """
    def wait_member(self, member: int, line: int, target: int, timeout_s: float = -1.0, heed_poison: bool = True) -> int:
        """The same for one member."""
    def reached(self, line: int, target: int) -> bool:
        """Whether ``wait`` would return 0 at once."""
    def resolve(self, sequence: int, offer: Offer) -> int:
        """Compare every active member's header of ``sequence`` with ``offer``, and look up all segments in ``sources``.

        Returns -1, or the first member with another sequence or other agreed bytes (then ``sources`` is incomplete). Raises CoreError
        when a member has not published yet, or names memory outside its window.
        """
    def sources(self, segment: int) -> Sources:
        """The ranges of one segment; always the same object, filled by ``resolve``."""
    def body(self, member: int, sequence: int) -> bytes:
        """The body in the member's slot for ``sequence``."""
    def sequence_in_slot(self, member: int, sequence: int) -> int:
        """Which operation the member's slot for ``sequence`` really holds; 0 for none."""
    def post(self, number: int, message: bytes) -> None:
        """Put message ``number`` on the own board: small agreements outside operations. Wait for POSTED, then ``posted``.

        Message n may be posted when every reader is done with n - 2.
        """
    def posted(self, member: int, number: int) -> bytes:
        """A member's message, padded with zeros to POST_BYTES. Raises CoreError when it is not there yet."""
    def counter(self, member: int, line: int) -> int:
        """A member's counter now."""
    def alive(self, member: int) -> bool:
        """Whether the member's process lives."""
    def poison(self, code: int, subject: int, text: str) -> bool:
        """Give the group up on all ranks: their waits end. The first cause of an epoch stays; True if it was this one.

        ``code``: 16 bits, the caller's. ``subject``: the member it is about. ``text``: up to 511 bytes, for messages.
        """
    @property
    def poisoned(self) -> bool:
        """Whether a cause of this epoch stands. A load; read it on entry of every call."""
    def cause(self) -> tuple[int, int, int, int, str]:
        """(epoch, code, subject, finder, text) of the cause; meaningful only when there is one."""

@final
class KeyCheck:
    """Checks one rank's raw keys and writes them as they are published. Pair = row * width + column."""

    def __init__(self, width: int, num_keys: int, first_special: int, end_special: int, extra_keys: Sequence[int] = ...) -> None:
        """Valid are [0, num_keys), and [first_special, end_special), which address no member.

        ``extra_keys``: appended to each row of which any pair takes part.
        """
    @property
    def out_width(self) -> int:
        """``width`` + number of extra keys."""
    @property
    def bad_pair(self) -> int: ...
    @property
    def bad_key(self) -> int: ...
    def run(self, raw: int, num_rows: int, active_rows: int, mask: int, out: int) -> int:
        """``raw``: [num_rows, width] int32. ``out``: [num_rows, out_width] int32; special and absent pairs become -1. 0: check alone.

        Rows from ``active_rows`` on, and pairs whose byte in ``mask`` ([num_rows, width], address 0: none) is 0, take no part and are
        never read. Returns 0, or KEY_OUT_OF_RANGE / KEY_DUPLICATE (twice in one row) for ``bad_pair`` with value ``bad_key``.
        """

def last_sum(sums: int, num_sums: int) -> int:
    """The last of ``num_sums`` running counts (int32), which begin at 0 or above and never fall; -1 where they do, 0 for none."""

@final
class KeySort:
    """Places what all sources have for the keys [first, end): by key, then source, then pair.

    Example: two sources with rows of two keys, 0 2 | 3 1 | 2 3 and 1 0 | 2 0 | 3 1; first=0, end=2 gives the tags
    (0,0,0) (1,0,1) (1,1,1) (0,1,1) (1,0,0) (1,2,1) and the running counts 1 3 4 6.
    """

    def __init__(self, width: int, num_keys: int, first: int, end: int) -> None:
        """``width``: keys a row. ``num_keys``: all keys of the group; [first, end) are this rank's."""
    def run(self, keys: Sources) -> int:
        """``keys``: [rows, width] int32 of each source, as KeyCheck wrote them. Returns the number of rows placed.

        Raises CoreError on a key outside [-1, num_keys), naming source and pair.
        """
    @property
    def num_rows(self) -> int: ...
    @property
    def num_counts(self) -> int:
        """(end - first) * number of sources."""
    def write_running_counts(self, out: int) -> None:
        """[end - first, num_sources] int32: rows up to and with (key, source)."""
    def write_key_counts(self, out: int, cumulative: bool) -> None:
        """[end - first] int64: rows of each key, or up to and with it."""
    def write_tags(self, out: int) -> None:
        """[num_rows, 3] int32: source, row at the source, column."""
    def place(
        self, items: Sources, out: int, out_bytes: int, item_bytes: int, stride: int, per_pair: bool, nt_bytes: int = 0
    ) -> None:
        """Copy each placed row's item from its source to ``out + place * item_bytes``.

        ``items``: what each source has, one item a row, or one a pair (``per_pair``), ``stride`` bytes apart. ``nt_bytes``: copy past
        the cache when at least so many bytes move in all; 0: never. Raises CoreError when ``out_bytes`` or a source is too short.
        """

@final
class TermPlan:
    """Finds the rows that were placed for this rank's pairs at their owners, as terms of a sum."""

    def __init__(
        self, width: int, num_weighted: int, num_sources: int, me: int, owners: Sequence[int], slots: Sequence[int]
    ) -> None:
        """Key k belongs to source ``owners[k]`` and is its ``slots[k]``-th. ``me``: this rank's own number among the sources.

        The first ``num_weighted`` of the ``width`` columns have weights; the others count once.
        """
    @property
    def bad_pair(self) -> int: ...
    @property
    def bad_owner(self) -> int: ...
    def run(
        self,
        keys: int,
        num_rows: int,
        weights: int,
        counts: Sources,
        tags: Sources | None,
        items: Sources,
        item_bytes: int,
        stride: int,
        out: int,
        terms_per_row: int,
    ) -> int:
        """``keys``: [num_rows, width] int32 as KeyCheck wrote them. ``weights``: [num_rows, num_weighted] float32, or 0 for all 1.

        ``counts``, ``tags``, ``items``: what each owner publishes: KeySort's running counts and tags (None: not compared), and its rows.
        ``out``: terms [num_rows, terms_per_row], 16 bytes each: uint64 address, float32 weight, uint32 kind. The first ``width`` of each
        row are written; more may be filled in by the caller. Returns 0, or a FAULT_* for ``bad_pair`` (-1 with FAULT_REST) at source
        ``bad_owner``.
        """

def copy(out: int, source: int, num_bytes: int, nt_bytes: int = 0) -> None:
    """Plain copy; past the cache when ``nt_bytes`` is not 0 and not more than ``num_bytes``."""

def gather_rows(
    out: int,
    out_stride: int,
    source: int,
    source_bytes: int,
    stride: int,
    index: int,
    num_rows: int,
    row_bytes: int,
    nt_bytes: int = 0,
) -> None:
    """Row i of ``out`` = row ``index[i]`` (int32) of ``source``; -1 leaves row i alone.

    Raises CoreError, with nothing written, on an index outside [-1, rows in source_bytes).
    """

def quantise_rows(
    dtype: int,
    hidden: int,
    num_rows: int,
    source: int,
    stride: int,
    source_rows: int,
    out: int,
    scales: int,
    index: int = 0,
    smooth: int = 0,
    smooth_rows: int = 0,
    smooth_index: int = 0,
) -> None:
    """int8 with one scale a row: f = float32(row) * factors; d = 127 / max|f|; out = rint(f * d), half to even; scale = 1 / d.

    ``out``: [num_rows, hidden] int8; ``scales``: [num_rows] float32. ``index`` (int32 [num_rows], 0: row i itself) picks the row of
    ``source``, ``smooth_index`` (likewise; 0: row 0) that of ``smooth`` (float32 [smooth_rows, hidden], 0: no factors); a negative
    index leaves the result alone. A row of zeros, or of values so small that d overflows: zeros, scale 0. A row with a value that is
    not finite: zeros, scale NaN. Raises CoreError on an index out of range.
    """

def combine_rows(
    dtype: int, to_f32: bool, terms: int, num_rows: int, terms_per_row: int, hidden: int, out: int, out_stride: int
) -> None:
    """Row i of ``out`` = sum over its terms, in order, of float32(row) * weight, from +0; multiply and add rounded separately.

    Rounded to nearest even to ``dtype`` at the end (fp16 beyond 65504: infinity), or left as float32 (``to_f32``). Every NaN is the
    positive quiet one. The bits do not depend on the machine. ``out_stride`` in bytes.
    """

def pack_rows(dtype: int, source: int, num_rows: int, hidden: int, out: int, scales: int) -> None:
    """int8 in blocks of 8 elements (the last of a row may be shorter): scale = max * float32(1/127), q = rint(fp16(x / scale)).

    ``out``: [num_rows, hidden] int8, within -127 to 127; ``scales``: [num_rows, ceil(hidden / 8)] of ``dtype``. A block of zeros: 0 and
    scale 0. A block with a value that is not finite: 0 and scale NaN.
    """

def unpack_rows(dtype: int, source: int, scales: int, num_rows: int, hidden: int, out: int) -> None:
    """The other way: out = dtype(float32(q) * float32(scale))."""

def kernels_name() -> str:
    """Which row kernels run: "avx512", "avx2" or "plain". All give the same bits."""

def choose_kernels(name: str) -> None:
    """Use these from now on, in the whole process; "" for the best. Raises CoreError when this build or CPU has them not."""

def has_kernels(name: str) -> bool:
    """Whether ``choose_kernels`` would take it."""

@final
class Reading:
    """A call that has published a slab, and the members that may be reading it."""

@final
class Slab:
    """A piece of an arena."""

    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def used(self) -> int:
        """Bytes that have been made ready to be written."""
    def add_reader(self, reading: Reading) -> None:
        """Note that it has been published; what one group's latest call has published says all of its calls before."""
    def in_use(self) -> bool:
        """Whether a peer may still read it."""

@final
class Slabs:
    """Pieces of an arena, free again when they have been given back and every reader is done. One thread at a time."""

    def __init__(self, arena: Arena, tensor_type: type, on_large_tail: Callable[[int, int], None]) -> None:
        """``tensor_type``: offers DLPack's exchange table (torch.Tensor).

        ``on_large_tail(filled, used)``: told once, when far more bytes were filled behind the used part of a slab than are used.
        """
    def take(self, num_bytes: int) -> Slab:
        """A free slab of at least so many bytes; its memory is not there yet. CoreMemoryError: the address space is used up."""
    def take_ready(self, num_bytes: int, used: int) -> Slab:
        """The same, and its first ``used`` bytes can be written. CoreMemoryError: there is not enough memory, too."""
    def populate(self, slab: Slab, num_bytes: int) -> None:
        """Make the first bytes ready to be written, if need be in the place of all free slabs' memory.

        CoreMemoryError: there is not enough memory; nothing has been touched.
        """
    def give(self, slab: Slab) -> None:
        """Take it back; it is handed out again when its readers are done."""
    def empty_free(self) -> bool:
        """Give the memory of all free slabs back to the system; False when they have none."""
    def at(self, address: int) -> Slab | None:
        """The slab under the tensor that begins at ``address``, if one does."""
    def lend(self, slab: Slab, shape: Sequence[int], sample: torch.Tensor) -> torch.Tensor:
        """A tensor of the dtype of ``sample`` over ``slab``, which comes back when the last alias of the tensor is gone."""
    def view(self, slab: Slab, begin: int, shape: Sequence[int], sample: torch.Tensor) -> torch.Tensor:
        """A tensor of the dtype of ``sample`` over ``slab`` from byte ``begin`` on, for use while the slab is taken.

        CoreError: it would reach beyond the window.
        """

@final
class Turnstile:
    """What all calls of a group go through: one thread at a time."""

    calls: int
    """Begun since the group began or began anew: the number of the present one."""
    seating: int
    """To be changed when other ranks take part, sit in another order, or must agree anew: calls that repeat end then."""
    has_told_others: bool
    """Other groups have been told where this rank waits, which the next call has to take back."""
    unheard: int
    """Setups whose headers have not been compared."""
    def enter(self) -> bool:
        """Begin a call of this thread, to be ended with `leave`; False in a forked child, and while another is under way."""
    def leave(self) -> None: ...
    @property
    def here(self) -> bool:
        """Whether this is the process that made it."""
    @property
    def is_shut(self) -> bool:
        """Whether a call is under way."""

@final
class Calls:
    """One line of calls, each with a place of its own; and what they have published meanwhile."""

    def __init__(self, channel: Channel, turns: Turnstile, slabs: Slabs, depth: int) -> None:
        """``depth``: of the ring of headers."""
    @property
    def newest(self) -> int:
        """The place of the newest call."""
    @property
    def in_the_way(self) -> int:
        """The call whose header the next one will overwrite: every rank must have consumed it. 0: none."""
    def begin(self) -> int:
        """Take the next place. Nothing may be in the way."""
    def end(self, sequence: int) -> None:
        """This rank has read all it needs of the data of this call. Nothing happens if the group has begun anew since then."""
    def restart(self, newest: int) -> None:
        """Begin anew behind call ``newest``; nothing is open or lent any more."""
    def seat(self, members: Sequence[int]) -> None:
        """The members that take part have changed: see `Channel.active`."""
    def reading(self, sequence: int) -> Reading: ...
    def lend(self, tensor: torch.Tensor, sequence: int) -> None:
        """Note that call ``sequence`` has published ``tensor`` where it lies, and as which version."""
    @property
    def changed_loan(self) -> int:
        """The call that published a tensor which has been changed since; 0: none."""
    def take_back(self) -> None:
        """Forget the loans that every member is known to have read."""

DIFFERS: int
FAULT: int
UNHEARD: int

class Repeated:
    """A call whose arguments have the form of an earlier one: tensors of its shapes and dtypes, dense; all others equal.

    Raises CoreError for arguments that cannot be compared, or tensors that are not dense.
    """

    def run(self, args: dict[str, Any]) -> tuple[torch.Tensor, ...] | int | None:
        """The outputs; None, and nothing is published, when this is another call or not an ordinary one.

        An int says for what the caller has to go on: above 0, the wait for the others has ended with this status of `Channel.wait`;
        DIFFERS: headers differ; FAULT: rows do not fit; UNHEARD: not all are known to be content. The call is under way then, and
        when an exception is raised: `finish` goes on with it, `give_up` ends it.
        """
    def finish(self) -> tuple[torch.Tensor, ...] | int:
        """As `run`, once all have published."""
    def give_up(self, has_failed: bool) -> None:
        """End a call that is under way, and count it if it has failed."""
    @property
    def is_under_way(self) -> bool: ...
    @property
    def is_current(self) -> bool:
        """Whether the seating is as it was when this was made."""
    @property
    def offer(self) -> Offer:
        """The header that was published last."""
    @property
    def sequence(self) -> int:
        """Its place."""
    at_step: Callable[[str], None] | None
    """Called with the name of each step that begins; for tests."""

@final
class RepeatedDispatch(Repeated):
    """Segments: keys, rows, factors, weights."""

    def __init__(
        self,
        args: dict[str, Any],
        calls: Calls,
        check: KeyCheck,
        sort: KeySort,
        body: bytes,
        number_at: int,
        outputs: Sequence[tuple[Sequence[int], Any]],
        tally: Any,
        dtype: int,
        quantised: bool,
        cumulative: bool,
        nt_bytes: int,
        inference_mode: Callable[[], bool],
        lend_normal: Callable[[Slab], torch.Tensor],
    ) -> None:
        """``body``: of the header; all up to and with the 8 bytes of a number at ``number_at`` must agree.

        ``outputs``: shape, and a tensor of the dtype, of rows, factors, tags, key counts, running counts, own rows (or none), weights.
        ``tally``: three int64 that can be written: calls, errors, nanoseconds. ``lend_normal``: what makes the tensor of the rows
        while ``inference_mode`` is on, when tensors that are made do not count their changes.
        """

@final
class RepeatedCombine(Repeated):
    """Segments: running counts, tags, rows (where they are copied in, those for others: this rank reads its own where they lie)."""

    def __init__(
        self,
        args: dict[str, Any],
        calls: Calls,
        check: KeyCheck,
        terms: TermPlan,
        sort: KeySort,
        body: bytes,
        number_at: int,
        outputs: Sequence[tuple[Sequence[int], Any]],
        tally: Any,
        dtype: int,
        num_counts: int,
        room: int,
        nt_bytes: int,
    ) -> None:
        """``num_counts``: running counts of this rank. ``room``: the most rows that may be held. ``outputs``: the sums."""
    @property
    def keys(self) -> int:
        """Where the keys were written."""
    @property
    def fault(self) -> int:
        """After FAULT: one of `TermPlan`."""
    def close(self) -> tuple[torch.Tensor, ...]:
        """End a call that has stopped at UNHEARD, once all are known to be content."""
