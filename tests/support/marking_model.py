"""A model of the marking protocol, and a search of every order of its steps. See SPEC.md, "Marking".

The world is a simulated memory, log and store. In it live two markers, a keeper of two threads (one cuts, one saves),
somebody who closes the gate, one who reads, one who recovers, and a killer. Every step is one access to what others can
see: a load, a store, an atomic, a lock, a system call. The search takes them in every order, from one beginning; a
state that has been reached twice is followed once. All accesses that race are sequentially consistent, so these orders
are all there are.

The death of everybody, and a power loss, are no steps: what they would leave is asked in every state. For the power
loss, each record of the log counts only if it is there in its cached and in its last durable version.

The disk has two granules in one region. A *mutant* is the protocol with one step left out, put elsewhere or done in
another way; what the search then finds is why the step is as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Final

State = bytes
_SLOTS: Final = 3  # of the two markers, and of the keeper's thread that cuts
_KEEPER: Final = 2
_ENTRIES: Final = 2
_ORPHAN: Final = 8  # in the word of a flight entry, beside 1 + its interval

# The fields of a state, each a byte.
_n = count()
INTERVAL, LOG, REFUSED = next(_n), next(_n), next(_n)  # the word "state"
GATE, GATE_LOCK = next(_n), next(_n)
BITS = [next(_n) for _ in range(3)]  # of each interval: a bit a granule
KNOWN = [next(_n) for _ in range(2)]  # the logged regions of logs of even and of odd number: 1, or 0
CACHED = [next(_n) for _ in range(2)]  # the record of each parity: 1 + its log, as written
DURABLE = [next(_n) for _ in range(2)]  # and as synced
GONE = next(_n)  # intervals whose buffers were given back, a bit each
OLDEST, STORE_LOG, SAVED, BEGAN, SAVED_NEW = (next(_n) for _ in range(5))  # the store; see `_judge`
MAY, MAY_NEW = next(_n), next(_n)  # granules that somebody was allowed to write: ever, in the newest window
SENT = [next(_n) for _ in range(2)]  # of each granule: 1 + the interval in which a dead marker had begun a write
# The slots: who holds its byte (0 nobody, 1 its marker, 2 the keeper), the words of marking, a failed sync to be told.
LOCK, SEEN, LOGGING, FAILED = ([next(_n) for _ in range(_SLOTS)] for _ in range(4))
JOINED = [next(_n) for _ in range(_SLOTS)]  # the shared lock of the log, which each process has
WORD = [[next(_n) for _ in range(_ENTRIES)] for _ in range(2)]
RANGE = [[next(_n) for _ in range(_ENTRIES)] for _ in range(2)]
# What a marker knows privately: the state it read, the one it follows, the entry it has, the gate; and for the judge
# which of its writes this is, and which interval was current when it began to mark.
AT, READ_I, READ_L, OWN_I, OWN_L, ENTRY, SAW_GATE, TURN, SINCE, LATE, MINE, OLD_WORD = (
    [next(_n) for _ in range(_SLOTS)] for _ in range(12)
)
ASIDE, ASIDE_ENTRY = ([next(_n) for _ in range(_SLOTS)] for _ in range(2))  # a write begun by ``a``: 1 + its interval
CUT_AT, CUT_SLOT, CUT_ENTRY = (next(_n) for _ in range(3))
SAVE_AT, SAVE_SLOT, SAVE_NOW, PINNED = (next(_n) for _ in range(4))
SNAP = [next(_n) for _ in range(3)]
CLOSE_AT, CLOSE_GATE, CLOSE_SLOT, CLOSE_ENTRY, DISTURBED = (next(_n) for _ in range(5))
RECOVER_AT = next(_n)
WITHDRAWN, RECYCLED = next(_n), next(_n)  # intervals without a descriptor, a bit each; and that word
READ_AT, READ_MAY, READ_FOUND, READ_FROM, READ_TO, READ_RECYCLED = (next(_n) for _ in range(6))
CUTS, SAVES, HOLDS = (next(_n) for _ in range(3))  # what is still to be done
KILL_MARKER, KILL_KEEPER, KILL_CLOSER, PATIENCE, FAILING, FULL, READS = (next(_n) for _ in range(7))  # and to happen
_SIZE = next(_n)

NONE: Final = 9
# Where a marker, the keeper's two threads, who closes the gate and who recovers are: at the step that comes next.
(LOAD, PUBLISH, FOLLOW, IS_LOGGED) = range(4)
(ANNOUNCE, STILL, RECORD, SYNC, SET_LOGGED, SILENT, POISON, GIVE_UP) = range(4, 12)
(BEGIN, MARK, MARK_STORE, AGAIN, GATE_OPEN, RETURN_LATE, WRITING, RETRACT, RETRACT_WAIT) = range(12, 21)
(WAIT, PROBE, PUSH, JOIN, VOUCH, ATTACH, DISOWN, RESET) = range(21, 29)
(IDLE, DONE, DEAD) = range(29, 32)
(SWAP, SCAN, DISOWN_ENTRY, UNLOCK_SLOT, MARKING, COMMIT, CLEAR, CLEAR_ENTRY) = range(8)
(SAVE, GRACE, FORGET, LET_GO, WIPE, ROTATE, LOOK, READ0, READ1, READ2, STORE, PIN, WITHDRAW, RAISE, GIVE_BACK) = range(
    15
)
(PROBE_ALL, RECOVER, RECOVERED) = range(3)
(READ_STORE, READ_STATE, READ_DESCRIPTOR, READ_BITS, READ_AGAIN) = range(5)
(LOCK_GATE, READ_GATE, CLOSE, DRAIN, HOLDING, UNLOCK) = range(6)


class BrokenError(Exception):
    """A rule of the protocol is broken: the message says which."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Who does what, and what befalls them.

    Attributes:
        writes: of each marker, in order: ``w`` begins a write, makes it and ends it; ``a`` only begins one, which ends
            behind all others; ``b`` is a bare mark; ``.`` lives on and does nothing.
        cuts, saves: of the keeper.
        beside: its cuts and its saves may overlap.
        holds: how often the gate is closed.
        marker_kills, keeper_kills, closer_kills: how often the killer may strike. Another keeper adopts the session,
            another closer comes if there are holds left.
        anew: where a marker dies, another process takes its slot, and makes the writes that are left.
        entries: flight entries of a slot.
        same: both markers write the same granule.
        impatient: how often a write may lose its patience with a closed gate.
        failing: how many syncs fail.
        full: how many records meet a full disk.
        recovered: where nobody is left, somebody recovers the session.
        reads: how often somebody reads what is dirty, without any lock.
    """

    writes: tuple[str, ...]
    cuts: int = 0
    saves: int = 0
    beside: bool = False
    holds: int = 0
    marker_kills: int = 0
    keeper_kills: int = 0
    closer_kills: int = 0
    anew: bool = False
    entries: int = 1
    same: bool = False
    impatient: int = 0
    failing: int = 0
    full: int = 0
    recovered: bool = False
    reads: int = 0


class Model:
    """The protocol, or one of its mutants, in one set-up."""

    def __init__(self, setup: Setup, mutant: str = "") -> None:
        assert not mutant or mutant in MUTANTS
        self.setup, self.mutant = setup, mutant
        self._out: list[tuple[str, State]] = []

    def first(self) -> State:
        setup, s = self.setup, bytearray(_SIZE)
        s[CUTS], s[SAVES], s[HOLDS] = setup.cuts, setup.saves, setup.holds
        s[KILL_MARKER], s[KILL_KEEPER], s[KILL_CLOSER] = setup.marker_kills, setup.keeper_kills, setup.closer_kills
        s[PATIENCE], s[FAILING], s[FULL], s[READS] = setup.impatient, setup.failing, setup.full, setup.reads
        for m in range(_SLOTS):
            s[SEEN[m]], s[LOCK[m]], s[JOINED[m]] = NONE, 1, 1
            s[AT[m]], s[MINE[m]] = LOAD, 1 if setup.same else 1 << m
        for m in range(len(setup.writes), 2):
            s[LOCK[m]], s[JOINED[m]], s[AT[m]] = 0, 0, DONE
        s[AT[_KEEPER]] = IDLE
        return bytes(s)

    def steps(self, s: State) -> list[tuple[str, State]]:
        """Every step that is possible in a state, with what comes of it.

        Raises:
            BrokenError: a rule is broken in this state or by one of the steps.
        """
        self._out = out = []
        self._judge(s)
        for m in range(_SLOTS):
            if s[AT[m]] < IDLE:
                self._marker(s, m)
        if s[CUT_AT] != DEAD:
            self._cutter(s)
            self._saver(s)
        if self.setup.holds:
            self._closer(s)
        if self.setup.recovered:
            self._recoverer(s)
        if s[READS]:
            self._reader(s)
        if not out:
            for m in range(2):
                if s[AT[m]] < IDLE and not (s[AT[m]] == LOAD and self._turn(s, m) == "."):
                    raise BrokenError("a marker waits for ever")
            if s[CUT_AT] not in (DEAD, SWAP) or s[SAVE_AT] not in (DEAD, SAVE):
                raise BrokenError("the keeper waits for ever")
            if s[CLOSE_AT] not in (DEAD, LOCK_GATE):
                raise BrokenError("who closed the gate waits for ever")
        self._killer(s)
        return out

    def _to(self, s: State, what: str, *changes: int) -> None:
        """Adds a step that changes these fields: field, value, field, value..."""
        n = bytearray(s)
        for i in range(0, len(changes), 2):
            n[changes[i]] = changes[i + 1]
        self._out.append((what, bytes(n)))

    # A marker; m is its slot. The keeper marks, too, when it marks again what a dead marker had begun.

    def _marker(self, s: State, m: int) -> None:
        at, mutant, to = s[AT[m]], self.mutant, self._to
        writes = "b" if m == _KEEPER else self.setup.writes[m]
        pc = AT[m]
        if at == LOAD:
            if s[TURN[m]] >= len(writes):
                if s[ASIDE[m]]:
                    return to(s, "end the other write", WORD[m][s[ASIDE_ENTRY[m]]], 0, ASIDE[m], 0, ASIDE_ENTRY[m], 0)
                return to(s, "detach", pc, DONE, LOCK[m], 0, JOINED[m], 0, SEEN[m], NONE)
            if writes[s[TURN[m]]] == ".":
                return None
            if s[REFUSED] and mutant != "refusal ignored":
                return self._fail(s, m, "load state: refused")
            since = (SINCE[m], s[SINCE[m]] or s[INTERVAL] + 1, LATE[m], s[LATE[m]] if s[SINCE[m]] else s[REFUSED])
            known = (s[INTERVAL] + 1, s[LOG]) == (s[OWN_I[m]], s[OWN_L[m]])
            after = IS_LOGGED if known else PUBLISH
            return to(s, "load state", pc, after, READ_I[m], s[INTERVAL], READ_L[m], s[LOG], *since)
        if at == PUBLISH:
            if mutant == "seen left out":
                return to(s, "-", pc, IS_LOGGED, OWN_I[m], s[READ_I[m]] + 1, OWN_L[m], s[READ_L[m]])
            if mutant == "seen behind the second look" and self._same(s, m):
                return to(s, "look", pc, FOLLOW)
            return to(s, "store seen", pc, FOLLOW, SEEN[m], s[READ_I[m]])
        if at == FOLLOW:
            own = (OWN_I[m], s[READ_I[m]] + 1, OWN_L[m], s[READ_L[m]])
            if mutant == "seen behind the second look":
                return to(s, "store seen", pc, IS_LOGGED, SEEN[m], s[READ_I[m]], *own)
            return to(s, "load state", pc, IS_LOGGED, *own) if self._same(s, m) else to(s, "another", pc, LOAD)
        if at == IS_LOGGED:
            known = s[KNOWN[s[READ_L[m]] & 1]]
            if mutant == "a set bit excuses from logging" and s[BITS[s[READ_I[m]]]] & s[MINE[m]]:
                known = 1
            if m == _KEEPER and mutant == "the dead marked without the log":
                known = 1
            return to(s, "load logged", pc, self._begins(s, m) if known else ANNOUNCE)
        if at < BEGIN:
            return self._log(s, m)
        if at < JOIN:
            return self._write(s, m)
        return self._attach(s, m)

    def _log(self, s: State, m: int) -> None:
        """Logs the region."""
        at, mutant, to, pc = s[AT[m]], self.mutant, self._to, AT[m]
        log, parity = s[READ_L[m]], s[READ_L[m]] & 1
        if at == ANNOUNCE:
            if mutant == "logging announced behind the second look":
                return to(s, "load state", pc, STILL if self._same(s, m) else LOAD)
            if mutant == "logging not announced":
                return to(s, "-", pc, STILL)
            return to(s, "store logging", pc, STILL, LOGGING[m], log + 1)
        if at == STILL:
            if mutant == "logging announced behind the second look":
                return to(s, "store logging", pc, RECORD, LOGGING[m], log + 1)
            if mutant == "no second look before a record" or self._same(s, m):
                return to(s, "load state", pc, RECORD)
            return to(s, "load state: another", pc, SILENT)
        if at == RECORD:
            if s[FULL]:
                after = SYNC if mutant == "a full disk ignored" else GIVE_UP
                to(s, "write record: disk full", pc, after, FULL, 0)
            early = (KNOWN[parity], 1) if mutant == "logged before the sync" else ()
            return to(s, "write record", pc, SYNC, CACHED[parity], log + 1, *early)
        if at == SYNC:
            poison = SET_LOGGED if mutant == "a failed sync ignored" else POISON
            if s[FAILED[m]]:
                return to(s, "sync: tells of a failure", pc, poison, FAILED[m], 0)
            if s[FAILING]:  # what was cached is lost, and each open is told so once
                told = [f for k in range(_SLOTS) if k != m for f in (FAILED[k], 1)]
                if mutant == "one open of the log for all":
                    told = []
                to(s, "sync: fails", pc, poison, FAILING, 0, CACHED[parity], s[DURABLE[parity]], *told)
            return to(s, "sync", pc, SET_LOGGED, DURABLE[parity], s[CACHED[parity]])
        if at == SET_LOGGED:
            return to(s, "set logged", pc, SILENT, KNOWN[parity], 1)
        if at == SILENT:
            return to(s, "logging = 0", pc, LOAD, LOGGING[m], 0)
        if at == POISON:
            return to(s, "poison", pc, GIVE_UP, REFUSED, 1)
        return self._fail(s, m, "logging = 0, error", LOGGING[m], 0)

    def _begins(self, s: State, m: int) -> int:
        return MARK if self._bare(s, m) or self.mutant == "entry behind the looks" else BEGIN

    def _write(self, s: State, m: int) -> None:
        """The entry, the bits, the looks at state and gate, the write, its end."""
        at, mutant, to, pc, mine = s[AT[m]], self.mutant, self._to, AT[m], s[MINE[m]]
        bits = BITS[s[READ_I[m]]]
        if at == BEGIN:
            if mutant == "gate looked at before the entry" and s[GATE] & 1 and not s[SAW_GATE[m]]:
                return to(s, "load gate: closed", pc, WAIT)
            if mutant == "gate looked at before the entry" and not s[SAW_GATE[m]]:
                return to(s, "load gate", pc, BEGIN, SAW_GATE[m], 1)
            free = self._free(s, m)
            if free is None:
                return self._fail(s, m, "no entry is free")
            return to(s, "store entry", pc, MARK, ENTRY[m], free, WORD[m][free], s[READ_I[m]] + 1, RANGE[m][free], mine)
        if at == MARK:
            if s[GONE] >> s[READ_I[m]] & 1:
                raise BrokenError("a mark touches a buffer that was given back")
            if mutant == "bits stored without an atomic":
                return to(s, "load bits", pc, MARK_STORE, OLD_WORD[m], s[bits] | mine)
            return to(s, "or bits", pc, self._looks(s, m), bits, s[bits] | mine)
        if at == MARK_STORE:
            return to(s, "store bits", pc, self._looks(s, m), bits, s[OLD_WORD[m]])
        if at == GATE_OPEN:
            if s[GATE] & 1:
                after = WAIT if mutant in ("entry kept at the gate", "entry behind the looks") else RETRACT_WAIT
                return to(s, "load gate: closed", pc, after)
            return to(s, "load gate", pc, AGAIN)
        if at == AGAIN:
            return self._again(s, m)
        if at == RETURN_LATE:
            n = bytearray(s)
            free = self._free(s, m)
            assert free is not None
            n[ENTRY[m]], n[WORD[m][free]], n[RANGE[m][free]] = free, s[READ_I[m]] + 1, mine
            return self._return(bytes(n), m, "store entry, return")
        if at == WRITING:  # the write is made meanwhile
            return self._fail(s, m, "end", WORD[m][s[ENTRY[m]]], 0)
        if at in (RETRACT, RETRACT_WAIT):
            return to(s, "entry = 0", pc, LOAD if at == RETRACT else WAIT, WORD[m][s[ENTRY[m]]], 0, SAW_GATE[m], 0)
        if at == WAIT:
            return to(s, "load gate", pc, PROBE if s[GATE] & 1 else LOAD, SAW_GATE[m], s[GATE] * (s[GATE] & 1))
        if at == PROBE:
            if s[GATE] != s[SAW_GATE[m]] or s[REFUSED]:
                return to(s, "look again", pc, LOAD if s[REFUSED] else WAIT, SAW_GATE[m], 0)
            if not s[GATE_LOCK] and mutant != "nobody asks who holds the gate":
                return to(s, "nobody holds the gate", pc, PUSH)
            if s[PATIENCE]:
                to(s, "waited too long", pc, PUSH, PATIENCE, s[PATIENCE] - 1)
            return None
        opened = s[GATE] + (s[GATE] == s[SAW_GATE[m]])  # PUSH
        return to(s, "open the gate", pc, WAIT, GATE, opened, SAW_GATE[m], 0)

    def _free(self, s: State, m: int) -> int | None:
        return next((e for e in range(self.setup.entries) if not s[WORD[m][e]]), None)

    def _again(self, s: State, m: int) -> None:
        """The last look at the state, and the return."""
        mutant, pc, bare = self.mutant, AT[m], self._bare(s, m)
        same = self._same(s, m)
        if mutant == "no last look":
            same = True
        elif mutant == "last look at the interval alone":
            same = s[INTERVAL] == s[READ_I[m]]
        elif mutant == "last look at the log alone":
            same = s[LOG] == s[READ_L[m]]
        if not same:
            return self._to(s, "another", pc, LOAD if bare or mutant == "entry behind the looks" else RETRACT)
        if mutant == "entry behind the looks" and not bare:
            return self._to(s, "load state", pc, RETURN_LATE)
        return self._return(s, m, "load state, return")

    def _looks(self, s: State, m: int) -> int:
        """What comes behind the bits."""
        unseen = self.mutant in ("no look at the gate", "gate looked at before the entry")
        return AGAIN if self._bare(s, m) or unseen else GATE_OPEN

    def _return(self, s: State, m: int, what: str, *changes: int) -> None:
        """A mark returns: from here on the caller may write."""
        mine = s[MINE[m]]
        if s[LATE[m]]:
            raise BrokenError("a mark was called behind the poison, and returned")
        if not any(s[BITS[j]] & mine for j in range(s[SINCE[m]] - 1, s[INTERVAL] + 1)):
            raise BrokenError("a mark returned, and its bit is in no interval that was current meanwhile")
        if m == _KEEPER:
            if self.mutant == "orphans cleared before the commit":
                return self._to(s, what, AT[m], IDLE, CUT_AT, CLEAR_ENTRY, SINCE[m], 0)
            return self._to(s, what, AT[m], IDLE, CUT_AT, SCAN, CUT_ENTRY, s[CUT_ENTRY] + 1, SINCE[m], 0)
        may = (MAY, s[MAY] | mine, MAY_NEW, s[MAY_NEW] | mine)
        if self._bare(s, m):
            return self._fail(s, m, what, *may)
        held = s[CLOSE_AT] == HOLDING
        if held and s[GATE] == s[CLOSE_GATE]:
            raise BrokenError("a write begins while the gate is closed and nothing is in flight")
        if self._turn(s, m) == "a":
            aside = (ASIDE[m], s[READ_I[m]] + 1, ASIDE_ENTRY[m], s[ENTRY[m]])
            return self._fail(s, m, what, DISTURBED, s[DISTURBED] | held, *aside, *may)
        return self._to(s, what, AT[m], WRITING, DISTURBED, s[DISTURBED] | held, *may, *changes)

    def _fail(self, s: State, m: int, what: str, *changes: int) -> None:
        """The end of a call, or of a write."""
        forget = (SINCE[m], 0, LATE[m], 0, READ_I[m], 0, READ_L[m], 0, ENTRY[m], 0, SAW_GATE[m], 0, OLD_WORD[m], 0)
        if m == _KEEPER:  # the session is poisoned: the cut is given up
            give_up = (CUT_AT, SWAP, CUTS, 0, CUT_SLOT, 0, CUT_ENTRY, 0)
            return self._to(s, what, AT[m], IDLE, *changes, *forget, *give_up)
        return self._to(s, what, AT[m], LOAD, TURN[m], s[TURN[m]] + 1, *changes, *forget)

    def _attach(self, s: State, m: int) -> None:
        """Another process takes the slot of a dead one."""
        at, mutant, to, pc = s[AT[m]], self.mutant, self._to, AT[m]
        living = any(s[LOCK[k]] for k in range(_SLOTS))
        if mutant == "a look for the living before the lock" and at in (JOIN, VOUCH):
            if at == JOIN:
                return to(s, "look for the living", pc, VOUCH if living else DONE)
            return to(s, "lock the log", pc, ATTACH, JOINED[m], 1)
        if at == JOIN:
            return to(s, "lock the log", pc, VOUCH, JOINED[m], 1)
        if at == VOUCH:
            if living or mutant == "no look for the living":
                return to(s, "somebody lives", pc, ATTACH)
            return to(s, "nobody lives", pc, DONE, JOINED[m], 0)
        if at == ATTACH:
            return None if s[LOCK[m]] else to(s, "lock slot", pc, DISOWN, LOCK[m], 1)
        if at == DISOWN:
            for e in range(self.setup.entries):
                word = s[WORD[m][e]]
                if word and word < _ORPHAN and mutant != "entries of the dead not disowned":
                    new = 0 if mutant == "attach clears entries" else word | _ORPHAN
                    return to(s, "disown entry", pc, DISOWN, WORD[m][e], new)
            return to(s, "none left", pc, RESET)
        return to(s, "reset slot", pc, LOAD, LOGGING[m], 0, SEEN[m], NONE, FAILED[m], 0)

    def _same(self, s: State, m: int) -> bool:
        refused = s[REFUSED] and self.mutant != "refusal ignored"
        return s[INTERVAL] == s[READ_I[m]] and s[LOG] == s[READ_L[m]] and not refused

    def _bare(self, s: State, m: int) -> bool:
        return self._turn(s, m) == "b"

    def _turn(self, s: State, m: int) -> str:
        return "b" if m == _KEEPER else self.setup.writes[m][s[TURN[m]]]

    # The keeper.

    def _cutter(self, s: State) -> None:
        at, mutant, to, pc = s[CUT_AT], self.mutant, self._to, CUT_AT
        slot, entry, interval = s[CUT_SLOT], s[CUT_ENTRY], s[INTERVAL]
        if at == SWAP:
            if not s[CUTS] or (s[SAVE_AT] != SAVE and not self.setup.beside):
                return None
            if s[REFUSED]:
                return to(s, "cut: refused", CUTS, 0)
            if mutant == "a cut waits before the swap":
                return to(s, "cut", pc, SCAN, CUTS, s[CUTS] - 1)
            after = COMMIT if mutant == "a cut waits for nobody" else SCAN
            return to(s, "cut: swap the interval", pc, after, CUTS, s[CUTS] - 1, INTERVAL, interval + 1)
        if at == SCAN:
            return self._scan(s)
        if at == DISOWN_ENTRY:
            if entry == self.setup.entries:
                return to(s, "logging = 0, seen none", pc, UNLOCK_SLOT, LOGGING[slot], 0, SEEN[slot], NONE)
            word = s[WORD[slot][entry]]
            disowned = (WORD[slot][entry], word | _ORPHAN) if word else ()
            return to(s, "disown entry", CUT_ENTRY, entry + 1, *disowned)
        if at == UNLOCK_SLOT:
            unlock = () if mutant == "a slot disowned without its lock" else (LOCK[slot], 0)
            return to(s, "unlock the slot", pc, SCAN, CUT_ENTRY, 0, *unlock)
        if at == COMMIT:
            n = bytearray(s)
            if mutant == "a cut waits before the swap":
                n[INTERVAL] = interval = interval + 1
            owed = 0
            for g in range(2):
                if s[SENT[g]]:
                    owed |= 1 << g
                    n[SENT[g]] = 0 if s[SENT[g]] - 1 < interval else s[SENT[g]]
            for m in range(2):
                if s[AT[m]] == WRITING or s[ASIDE[m]]:
                    owed |= s[MINE[m]]
            carried = s[BITS[interval]] if s[OLDEST] == interval and mutant != "a cut forgets what was saved" else 0
            n[BEGAN], n[SAVED_NEW], n[MAY_NEW] = interval, carried, owed
            return to(bytes(n), "cut: commit and return", pc, CLEAR, CUT_SLOT, 0, CUT_ENTRY, 0)
        if at == CLEAR:
            if slot == 2:
                return to(s, "all cleared", pc, SWAP, CUT_SLOT, 0)
            if entry == self.setup.entries:
                return to(s, "next slot", CUT_SLOT, slot + 1, CUT_ENTRY, 0)
            word = s[WORD[slot][entry]]
            old = word & _ORPHAN and (word & ~_ORPHAN) - 1 < interval
            if mutant == "orphans of the new interval cleared, too":
                old = word & _ORPHAN
            if mutant == "orphans never cleared":
                old = False
            if old:
                return to(s, "load entry: an old orphan", pc, CLEAR_ENTRY)
            return to(s, "load entry", CUT_ENTRY, entry + 1)
        if at == CLEAR_ENTRY:
            after = SCAN if mutant == "orphans cleared before the commit" else CLEAR
            return to(s, "entry = 0", pc, after, WORD[slot][entry], 0, CUT_ENTRY, entry + 1)
        return None  # marking

    def _scan(self, s: State) -> None:
        """A cut looks at one entry after the other, and waits for what is of an older interval."""
        mutant, to, pc, slot, entry = self.mutant, self._to, CUT_AT, s[CUT_SLOT], s[CUT_ENTRY]
        new = s[INTERVAL] + (mutant == "a cut waits before the swap")
        if slot == 2 or (slot == 1 and mutant == "a cut waits for one slot"):
            return to(s, "nothing is in flight", pc, COMMIT)
        if entry == self.setup.entries:
            return to(s, "next slot", CUT_SLOT, slot + 1, CUT_ENTRY, 0)
        word = s[WORD[slot][entry]]
        of = (word & ~_ORPHAN) - 1
        old = word and of < new
        if mutant == "a cut waits for the last interval alone":
            old = word and of == new - 1
        if not old:
            return to(s, "load entry", CUT_ENTRY, entry + 1)
        if word & _ORPHAN:
            if mutant == "orphans not marked":
                return to(s, "load entry", CUT_ENTRY, entry + 1)
            mine = s[RANGE[slot][entry]]
            return to(s, "mark what the dead had begun", pc, MARKING, AT[_KEEPER], LOAD, MINE[_KEEPER], mine)
        if not s[LOCK[slot]] and mutant != "a cut waits for the dead":
            locked = () if mutant == "a slot disowned without its lock" else (LOCK[slot], 2)
            return to(s, "lock the slot of the dead", pc, DISOWN_ENTRY, CUT_ENTRY, 0, *locked)
        return None

    def _saver(self, s: State) -> None:
        at, mutant, to, pc, slot = s[SAVE_AT], self.mutant, self._to, SAVE_AT, s[SAVE_SLOT]
        log = s[LOG]
        if at == SAVE:
            if not s[SAVES] or (s[CUT_AT] != SWAP and not self.setup.beside):
                return None
            if s[REFUSED]:
                return to(s, "save: refused", SAVES, 0)
            rotates = s[STORE_LOG] == log or mutant == "a save rotates twice"
            after = GRACE if rotates and mutant != "writesets read before the rotation" else LOOK
            return to(s, "save", pc, after, SAVES, s[SAVES] - 1)
        if at == GRACE:
            if slot == _SLOTS or not log or mutant == "no wait for who logs":
                return to(s, "nobody logs", pc, WIPE, SAVE_SLOT, 0)
            if s[LOGGING[slot]] != log:
                return to(s, "load logging", SAVE_SLOT, slot + 1)
            return None if s[LOCK[slot]] else to(s, "lock the slot of the dead", pc, FORGET, LOCK[slot], 2)
        if at == FORGET:
            words = WORD[slot] if slot < 2 else []
            wiped = mutant == "a save clears entries"
            words = [f for word in words if s[word] for f in (word, 0 if wiped else s[word] | _ORPHAN)]
            return to(s, "disown", pc, LET_GO, LOGGING[slot], 0, SEEN[slot], NONE, *words)
        if at == LET_GO:
            return to(s, "unlock", pc, GRACE, LOCK[slot], 0)
        if at == WIPE:
            late = mutant in ("logged regions kept", "logged regions wiped behind the rotation")
            return to(s, "wipe logged", pc, ROTATE, *(() if late else (KNOWN[log + 1 & 1], 0)))
        if at == ROTATE:
            if mutant == "logged regions wiped behind the rotation" and not s[PINNED]:
                return to(s, "swap the log", LOG, log + 1, PINNED, 1)
            if s[PINNED]:
                return to(s, "wipe logged", pc, LOOK, KNOWN[log & 1], 0, PINNED, 0)
            after = STORE if mutant == "writesets read before the rotation" else LOOK
            return to(s, "swap the log", pc, after, LOG, log + 1)
        if at == LOOK:
            return to(s, "load state", pc, READ0, SAVE_NOW, s[INTERVAL])
        if at in (READ0, READ1, READ2):
            j = at - READ0
            seen = s[BITS[j]] if s[OLDEST] <= j <= s[SAVE_NOW] else 0
            after = at + 1
            if at == READ2 and mutant == "writesets read before the rotation" and s[STORE_LOG] == log:
                after = GRACE
            return to(s, f"read writeset {j}", pc, after, SNAP[j], seen)
        if at == STORE:
            forget = [f for j in range(3) for f in (SNAP[j], 0)]
            if s[FAILING]:
                to(s, "commit: a sync fails", pc, SAVE, SAVES, 0, FAILING, 0, REFUSED, 1, SAVE_NOW, 0, *forget)
            now = s[INTERVAL] if mutant == "oldest is what is current at the commit" else s[SAVE_NOW]
            saved, new = s[SAVED], s[SAVED_NEW]
            for j in range(3):
                saved |= s[SNAP[j]]
                new |= s[SNAP[j]] if j >= s[BEGAN] else 0
            changes = (SAVED, saved, SAVED_NEW, new, OLDEST, now, STORE_LOG, log, SAVE_NOW, 0)
            return to(s, "commit", pc, PIN, *changes, *forget)
        if at == PIN:
            if slot == _SLOTS:
                return to(s, "-", pc, WITHDRAW if self.setup.reads else GIVE_BACK, SAVE_SLOT, 0)
            pins = s[SEEN[slot]] != NONE and s[LOCK[slot]] and mutant != "nobody asks who may touch a buffer"
            return to(s, "load seen", SAVE_SLOT, slot + 1, PINNED, s[PINNED] | (1 << s[SEEN[slot]] if pins else 0))
        before = (1 << s[OLDEST]) - 1
        late = mutant == "recycled raised behind the wipe"
        if at == WITHDRAW:
            return to(s, "withdraw descriptors", pc, GIVE_BACK if late else RAISE, WITHDRAWN, before)
        if at == RAISE:
            return to(s, "raise recycled", pc, SAVE if late else GIVE_BACK, RECYCLED, s[RECYCLED] + 1)
        return to(s, "give buffers back", pc, RAISE if late else SAVE, GONE, s[GONE] | before & ~s[PINNED], PINNED, 0)

    # Somebody who only reads.

    def _reader(self, s: State) -> None:
        at, to, pc = s[READ_AT], self._to, READ_AT
        if at == READ_STORE:
            begun = (READ_MAY, s[MAY], READ_FOUND, s[SAVED], READ_FROM, s[OLDEST])
            return to(s, "read: the store", pc, READ_STATE, *begun)
        if at == READ_STATE:
            return to(s, "read: state", pc, READ_DESCRIPTOR, READ_TO, s[INTERVAL], READ_RECYCLED, s[RECYCLED])
        if at == READ_DESCRIPTOR:
            if s[READ_FROM] > s[READ_TO]:
                return to(s, "read: all", pc, READ_AGAIN)
            after = READ_STORE if s[WITHDRAWN] >> s[READ_FROM] & 1 else READ_BITS
            return to(s, "read: descriptor", pc, after)
        if at == READ_BITS:
            found = 0 if s[GONE] >> s[READ_FROM] & 1 else s[BITS[s[READ_FROM]]]
            changes = (READ_FOUND, s[READ_FOUND] | found, READ_FROM, s[READ_FROM] + 1)
            return to(s, "read: bits", pc, READ_DESCRIPTOR, *changes)
        if s[RECYCLED] != s[READ_RECYCLED] and self.mutant != "recycled not looked at again":
            return to(s, "read: begin anew", pc, READ_STORE)
        if s[READ_MAY] & ~s[READ_FOUND]:
            raise BrokenError("a reader misses a write that was allowed before it began to read")
        return to(s, "read: done", pc, READ_STORE, READS, s[READS] - 1, READ_MAY, 0, READ_FOUND, 0)

    # A third party that closes the gate.

    def _closer(self, s: State) -> None:
        at, mutant, to, pc = s[CLOSE_AT], self.mutant, self._to, CLOSE_AT
        slot, entry, gate = s[CLOSE_SLOT], s[CLOSE_ENTRY], s[CLOSE_GATE]
        if at == LOCK_GATE:
            if s[HOLDS] and not s[GATE_LOCK]:
                after = DRAIN if mutant == "gate closed behind the wait" else READ_GATE
                to(s, "lock the gate", pc, after, GATE_LOCK, 1, HOLDS, s[HOLDS] - 1)
            return None
        if at == READ_GATE:
            return to(s, "load gate", pc, CLOSE, CLOSE_GATE, s[GATE])
        if at == CLOSE:
            closed = gate + (1 if mutant == "gate closed by adding 1" else 1 + (gate & 1))
            if s[GATE] != gate:
                return to(s, "another", pc, READ_GATE)
            if mutant in ("gate closed behind the wait", "the closer waits for nobody"):
                return self._hold(s, closed, GATE, closed, CLOSE_GATE, closed)
            return to(s, "close the gate", pc, DRAIN, GATE, closed, CLOSE_GATE, closed)
        if at == DRAIN:
            if slot == 2:
                if mutant == "gate closed behind the wait":
                    return to(s, "nothing is in flight", pc, READ_GATE, CLOSE_SLOT, 0)
                return self._hold(s, gate, CLOSE_SLOT, 0)
            if entry == self.setup.entries:
                return to(s, "next slot", CLOSE_SLOT, slot + 1, CLOSE_ENTRY, 0)
            word = s[WORD[slot][entry]]
            if not word or word & _ORPHAN:
                return to(s, "load entry", CLOSE_ENTRY, entry + 1)
            if not s[LOCK[slot]] and mutant != "the closer waits for the dead":
                return to(s, "nobody holds the slot", CLOSE_SLOT, slot + 1, CLOSE_ENTRY, 0)
            return None
        if at == HOLDING:
            held = s[GATE] == gate or mutant == "nobody tells who closed the gate"
            if held and s[DISTURBED]:
                raise BrokenError("writes began while the gate was closed, and who closed it is not told")
            opened = (GATE, gate + 1) if s[GATE] == gate else ()
            return to(s, "open the gate" if held else "it was opened by others", pc, UNLOCK, DISTURBED, 0, *opened)
        if at == UNLOCK:
            return to(s, "unlock the gate", pc, LOCK_GATE, GATE_LOCK, 0, CLOSE_GATE, 0)
        return None

    def _hold(self, s: State, gate: int, *changes: int) -> None:
        """The gate counts as closed from here on, and nothing as in flight."""
        writing = any(s[AT[m]] == WRITING or s[ASIDE[m]] for m in range(2))
        if writing and s[GATE] == gate:
            raise BrokenError("the gate is closed, and a write is still in flight")
        return self._to(s, "nothing is in flight", CLOSE_AT, HOLDING, DISTURBED, writing, *changes)

    # Who recovers the session, once nobody is left.

    def _recoverer(self, s: State) -> None:
        at, to = s[RECOVER_AT], self._to
        if at == PROBE_ALL:
            nobody = not s[LOCK[_KEEPER]] and not any(s[JOINED[k]] for k in range(_SLOTS))
            if nobody or self.mutant == "recovery asks for nobody":
                return to(s, "nobody holds the log", RECOVER_AT, RECOVER)
        if at == RECOVER:
            if any(s[AT[m]] == WRITING or s[ASIDE[m]] for m in range(2)):
                raise BrokenError("a session is recovered, and a write is in flight")
            found = s[SAVED]
            for j in range(s[OLDEST], s[INTERVAL] + 1):
                found |= s[BITS[j]]
            return to(s, "recover", RECOVER_AT, RECOVERED, SAVED, found)
        return None

    # Deaths.

    def _killer(self, s: State) -> None:
        for m in range(2):
            if s[KILL_MARKER] and s[AT[m]] < IDLE and (s[LOCK[m]] == 1 or s[JOINED[m]]):
                n = bytearray(s)
                n[KILL_MARKER] -= 1
                begun = max(s[ASIDE[m]], s[READ_I[m]] + 1 if s[AT[m]] == WRITING else 0)
                for g in range(2):  # it had sent on what it was about to write
                    if s[MINE[m]] >> g & 1:
                        n[SENT[g]] = max(s[SENT[g]], begun)
                left = s[TURN[m]] < len(self.setup.writes[m])
                n[AT[m]] = (JOIN if self.setup.recovered else ATTACH) if self.setup.anew and left else DEAD
                n[JOINED[m]] = 0
                for field in (READ_I, READ_L, OWN_I, OWN_L, ENTRY, SAW_GATE, SINCE, LATE, OLD_WORD, ASIDE, ASIDE_ENTRY):
                    n[field[m]] = 0
                n[LOCK[m]] = 0 if s[LOCK[m]] == 1 else s[LOCK[m]]
                self._out.append((f"kill marker {m}", bytes(n)))
        if s[KILL_KEEPER] and s[CUT_AT] != DEAD:
            n = bytearray(s)
            n[KILL_KEEPER] -= 1
            n[CUT_AT] = n[SAVE_AT] = n[AT[_KEEPER]] = DEAD
            n[JOINED[_KEEPER]] = 0
            private = (READ_I, READ_L, OWN_I, OWN_L, ENTRY, SINCE, LATE)
            for at in (CUT_SLOT, CUT_ENTRY, SAVE_SLOT, SAVE_NOW, PINNED, *SNAP, *(f[_KEEPER] for f in private)):
                n[at] = 0
            for k in range(_SLOTS):
                if s[LOCK[k]] == 2 or k == _KEEPER:
                    n[LOCK[k]] = 0
            self._out.append(("kill the keeper", bytes(n)))
        if s[KILL_CLOSER] and s[CLOSE_AT] != LOCK_GATE:
            gone = (CLOSE_AT, LOCK_GATE, GATE_LOCK, 0, CLOSE_GATE, 0, CLOSE_SLOT, 0, CLOSE_ENTRY, 0, DISTURBED, 0)
            self._to(s, "kill who closed the gate", KILL_CLOSER, s[KILL_CLOSER] - 1, *gone)
        if s[CUT_AT] == DEAD and not s[REFUSED]:
            if self.setup.recovered and not s[JOINED[_KEEPER]]:
                return self._to(s, "join", JOINED[_KEEPER], 1)
            if self.setup.recovered and not any(s[LOCK[m]] for m in range(2)):
                return self._to(s, "nobody lives", JOINED[_KEEPER], 0)
            fresh = ((JOINED, 1), (LOCK, 1), (LOGGING, 0), (SEEN, NONE), (FAILED, 0), (AT, IDLE))
            mine = [f for field, value in fresh for f in (field[_KEEPER], value)]
            self._to(s, "adopt", CUT_AT, SWAP, SAVE_AT, SAVE, *mine)

    def _judge(self, s: State) -> None:
        """What must be so in every state, whatever dies in it.

        Once a session is recovered, the saved bits are all there is. Before, one bitmap records from the beginning,
        with SAVED as its saved bits; another one from interval BEGAN on, where the last cut that returned has begun it,
        with SAVED_NEW.
        """
        if s[RECOVER_AT] > RECOVER:
            if s[MAY] & ~s[SAVED]:
                raise BrokenError("recovered: a write that was allowed is in no bits")
            return
        for began, saved, may in ((0, s[SAVED], s[MAY]), (s[BEGAN], s[SAVED_NEW], s[MAY_NEW])):
            found = saved
            for j in range(max(began, s[OLDEST]), s[INTERVAL] + 1):
                if not s[GONE] >> j & 1:
                    found |= s[BITS[j]]
            if may & ~found:
                raise BrokenError(f"all die: a write that was allowed is in no bits from interval {began} on")
            if may & ~saved:
                for log in (s[STORE_LOG], s[STORE_LOG] + 1):
                    if s[DURABLE[log & 1]] == s[CACHED[log & 1]] == log + 1:
                        break
                else:
                    raise BrokenError("power loss: a write that was allowed is neither saved nor in a log that counts")


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found.

    Attributes:
        states: how many it has seen.
        fault: the rule that is broken, or None.
        steps: how it came to that.
    """

    states: int
    fault: str | None
    steps: list[str]


def search(setup: Setup, mutant: str = "", limit: int | None = None) -> Found:
    """Follows every order of the steps, shortest first.

    Args:
        setup: who does what.
        mutant: one of `MUTANTS`, or none.
        limit: gives up, without a fault, when so many states have been seen.
    """
    model = Model(setup, mutant)
    start = model.first()
    parents: dict[State, State] = {start: start}
    wave = [start]
    while wave:
        later: list[State] = []
        for s in wave:
            try:
                steps = model.steps(s)
            except BrokenError as fault:
                return Found(len(parents), str(fault), list(_path(model, parents, s)))
            for _, n in steps:
                if n not in parents:
                    parents[n] = s
                    later.append(n)
        if limit is not None and len(parents) > limit:
            break
        wave = later
    return Found(len(parents), None, [])


def _path(model: Model, parents: dict[State, State], s: State) -> Iterator[str]:
    way = [s]
    while parents[s] != s:
        s = parents[s]
        way.append(s)
    way.reverse()
    for a, b in pairwise(way):
        yield next(name for name, n in model.steps(a) if n == b)


_READ: Final = Setup(("b",), cuts=1, saves=1, reads=1)
# What `make test` searches, and with the rest what `make test-long` does.
QUICK: Final = {
    "one marker, two cuts, marker and keeper killed": Setup(("w",), cuts=2, marker_kills=1, keeper_kills=1),
    "a slot taken anew, a cut, marker and keeper killed": Setup(
        ("ww",), cuts=1, marker_kills=2, keeper_kills=1, anew=True, entries=2
    ),
    "a cut and a save": Setup(("ww",), cuts=1, saves=1, marker_kills=1, keeper_kills=1),
    "two markers, a cut": Setup(("w", "w"), cuts=1, marker_kills=1),
    "one granule, a save": Setup(("w", "b"), saves=1, same=True),
    "a failed sync": Setup(("w", "b"), saves=1, marker_kills=1, failing=1),
    "a full disk": Setup(("b", "b"), saves=1, full=1),
    "the last one out": Setup(("w",), cuts=1, marker_kills=2, keeper_kills=2, anew=True, entries=2, recovered=True),
    "a reader": _READ,
    "the gate, one marker": Setup(("ww",), holds=2, marker_kills=1, closer_kills=1, impatient=1),
    "the gate and a cut": Setup(("w",), holds=1, cuts=1, marker_kills=1, keeper_kills=1, closer_kills=1, impatient=1),
    "the gate, two markers": Setup(("w", "w"), holds=1, marker_kills=1, closer_kills=1, impatient=1),
}
LONG: Final = {
    "two markers, two cuts, the keeper killed": Setup(("w", "w"), cuts=2, keeper_kills=1),
    "two markers, a cut and a save": Setup(("w", "w"), cuts=1, saves=1, marker_kills=1, keeper_kills=1),
    "a slot taken anew, two cuts": Setup(("ww",), cuts=2, marker_kills=2, keeper_kills=1, anew=True, entries=2),
    "a slot taken anew, a cut and a save": Setup(
        ("ww",), cuts=1, saves=1, marker_kills=1, keeper_kills=1, anew=True, entries=2
    ),
    "a cut beside a save": Setup(("ww",), cuts=1, saves=1, beside=True, marker_kills=1, keeper_kills=1),
    "two cuts, two saves": Setup(("ww",), cuts=2, saves=2, marker_kills=1, keeper_kills=1),
    "three logs": Setup(("b", "bb"), saves=2, keeper_kills=1),
    "two writes at once": Setup(("ab",), cuts=1, saves=2, marker_kills=1, keeper_kills=1, entries=2),
    "one granule, a cut and a save": Setup(("w", "bw"), cuts=1, saves=1, same=True),
    "a reader, a cut beside a save": Setup(("w",), cuts=1, saves=1, beside=True, keeper_kills=1, reads=1),
    "the gate and a cut, two markers": Setup(
        ("w", "w"), holds=1, cuts=1, marker_kills=1, keeper_kills=1, closer_kills=1, impatient=1
    ),
    "the gate twice, a slot taken anew, a cut": Setup(
        ("ww",), holds=2, cuts=1, marker_kills=1, closer_kills=1, anew=True, entries=2, impatient=1
    ),
    "a failed sync, a cut and a save": Setup(("w", "w"), cuts=1, saves=1, marker_kills=1, failing=1),
    "the last one out, a cut and a save": Setup(
        ("w",), cuts=1, saves=1, marker_kills=2, keeper_kills=2, anew=True, entries=2, recovered=True
    ),
    "the last one out, two markers": Setup(
        ("w", "b"), cuts=1, marker_kills=1, keeper_kills=2, anew=True, entries=2, recovered=True
    ),
}

_CUT: Final = Setup(("w",), cuts=1)
_DEATH: Final = Setup(("w",), cuts=2, marker_kills=1, keeper_kills=1)
_ANEW: Final = Setup(("ww",), cuts=2, marker_kills=1, anew=True, entries=2)
_SAVE: Final = Setup(("b",), saves=1)
_SAVES: Final = Setup(("bb",), saves=2, keeper_kills=1)
_BOTH: Final = Setup(("w",), cuts=1, saves=1, beside=True)
_LAST: Final = Setup(("w",), marker_kills=1, keeper_kills=1, anew=True, recovered=True)
_GATE: Final = Setup(("w",), holds=1)
_GATES: Final = Setup(("w",), holds=2, closer_kills=1)
# Each mutant, and the set-up in which it is looked for.
MUTANTS: Final = {
    # Between threads, and between a mark and a swap.
    "bits stored without an atomic": Setup(("b", "b")),
    "no last look": _CUT,
    "last look at the log alone": _CUT,
    "last look at the interval alone": _SAVE,
    "a set bit excuses from logging": Setup(("b", "b"), saves=1, same=True),
    "refusal ignored": Setup(("b", "bb"), failing=1),
    # Between a write and a cut.
    "entry behind the looks": _CUT,
    "a cut waits for nobody": _CUT,
    "a cut waits before the swap": _CUT,
    "a cut waits for one slot": Setup(("", "w"), cuts=1),
    "a cut waits for the last interval alone": Setup(("w",), cuts=2, keeper_kills=1),
    # The dead.
    "a cut waits for the dead": _DEATH,
    "orphans not marked": _DEATH,
    "orphans cleared before the commit": _DEATH,
    "orphans of the new interval cleared, too": _ANEW,
    "the dead marked without the log": Setup(("w",), cuts=1, saves=1, marker_kills=1),
    "entries of the dead not disowned": Setup(("w.",), cuts=1, marker_kills=1, anew=True, entries=2),
    "attach clears entries": _ANEW,
    "a slot disowned without its lock": Setup(("w",), cuts=2, saves=1, marker_kills=1, anew=True, entries=2),
    "a save clears entries": Setup(("ab",), cuts=1, saves=3, marker_kills=1, entries=2),
    "recovery asks for nobody": _LAST,
    "no look for the living": _LAST,
    "a look for the living before the lock": _LAST,
    # The log, and saves.
    "logged before the sync": Setup(("b", "b")),
    "writesets read before the rotation": _SAVE,
    "a save rotates twice": _SAVES,
    "no wait for who logs": _SAVES,
    "logging not announced": _SAVES,
    "logging announced behind the second look": _SAVES,
    "no second look before a record": _SAVES,
    "logged regions kept": _SAVES,
    "logged regions wiped behind the rotation": _SAVES,
    "oldest is what is current at the commit": _BOTH,
    "a cut forgets what was saved": _BOTH,
    "a failed sync ignored": Setup(("b",), failing=1),
    "one open of the log for all": Setup(("b", "b"), marker_kills=1, failing=1),
    "a full disk ignored": Setup(("b",), full=1),
    # Buffers that are given back.
    "seen left out": _BOTH,
    "seen behind the second look": Setup(("b", "b"), cuts=1, saves=1),
    "nobody asks who may touch a buffer": _BOTH,
    # Readers.
    "recycled not looked at again": _READ,
    "recycled raised behind the wipe": _READ,
    # The gate.
    "no look at the gate": _GATE,
    "gate looked at before the entry": _GATE,
    "entry kept at the gate": _GATE,
    "gate closed behind the wait": _GATE,
    "gate closed by adding 1": _GATES,
    "the closer waits for nobody": _GATE,
    "the closer waits for the dead": Setup(("w",), holds=1, marker_kills=1),
    "nobody asks who holds the gate": _GATES,
    "nobody tells who closed the gate": Setup(("w",), holds=1, impatient=1),
}
