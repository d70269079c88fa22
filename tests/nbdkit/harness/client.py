"""What the Python code of every test finds ready-made."""

import errno
import os
import random
import select
import struct
import sys
import time

import nbd

SOCKET = os.environ["NBD_SOCKET"]
ARGS = sys.argv[1:]

K = 1 << 10
M = 1 << 20
G = 1 << 30
T = 1 << 40

FUA = nbd.CMD_FLAG_FUA
NO_HOLE = nbd.CMD_FLAG_NO_HOLE
FAST = nbd.CMD_FLAG_FAST_ZERO
ONE = nbd.CMD_FLAG_REQ_ONE


def connect(export="", socket=SOCKET):
    connection = nbd.NBD()
    connection.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    connection.set_export_name(export)
    connection.connect_unix(socket)
    return connection


def lenient(connection):
    """Sends what libnbd would refuse by itself, so that the server has to."""
    connection.set_strict_mode(0)
    return connection


def noise(length, seed):
    return random.Random(seed).randbytes(length)


def refused(code, request, *args):
    """Makes a request that must fail, and with this errno ("EIO")."""
    try:
        request(*args)
    except nbd.Error as error:
        assert error.errno == code, f"{error.errno} instead of {code}: {error}"
        return
    raise AssertionError(f"no {code} from {request.__name__}")


def same(found, expected, offset=0):
    """Like assert ==, but says where the difference is instead of showing megabytes."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{len(found)} bytes, not {len(expected)}"
    wrong = [i for i in range(len(found)) if found[i] != expected[i]]
    first, last = wrong[0], wrong[-1]
    raise AssertionError(
        f"{len(wrong)} wrong bytes from {offset + first} to {offset + last}: "
        f"{bytes(found[first:first + 16]).hex()} instead of "
        f"{bytes(expected[first:first + 16]).hex()}"
    )


def read(connection, offset=0, length=None, step=3 * M + 511):
    """A range, by default the whole disk, in requests of an odd size."""
    end = connection.get_size() if length is None else offset + length
    found = bytearray()
    while offset < end:
        count = min(step, end - offset)
        found += connection.pread(count, offset)
        offset += count
    return found


def check_trimmed(connection, found, old, offset):
    """Whole blocks read as zeroes after a trim; each byte of a part is old or zero."""
    block = connection.get_block_size(nbd.SIZE_PREFERRED)
    end = offset + len(old)
    first = -(-offset // block) * block
    last = end if end == connection.get_size() else end // block * block
    first, last = (first, last) if first < last else (end, end)
    same(found[first - offset:last - offset], bytes(last - first), first)
    for part in [slice(0, first - offset), slice(last - offset, None)]:
        wrong = [i for i, (now, then) in enumerate(zip(found[part], old[part])) if now not in (0, then)]
        assert not wrong, f"byte {wrong[0]} of a trimmed part of a block at {offset}"


KINDS = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}


def extents(connection, offset=0, count=None):
    """[(offset, length, kind)] for a whole range, with equal neighbours merged."""
    end = connection.get_size() if count is None else offset + count
    merged = []
    while offset < end:
        for length, kind in reply(connection, min(end - offset, 0xFFFFFE00), offset):
            # A server may tell more than it was asked, and this is about the range.
            length = min(length, end - offset)
            assert length > 0, "an extent of no length"
            if merged and merged[-1][2] == kind:
                merged[-1] = (merged[-1][0], merged[-1][1] + length, kind)
            else:
                merged.append((offset, length, kind))
            offset += length
    return merged


def reply(connection, count, offset, flags=0):
    """[(length, kind)] exactly as one block status request is answered."""
    answer = []

    def extent(_context, at, entries, _error):
        assert at == offset, f"an answer about {at}, not {offset}"
        answer.extend(zip(entries[0::2], (KINDS[kind] for kind in entries[1::2])))

    connection.block_status(count, offset, extent, flags)
    assert answer, "a block status without extents"
    return answer


class Flight:
    """Keeps up to `depth` requests in flight over several connections."""

    def __init__(self, connections, depth):
        self.depth = depth
        self.open = []
        self.poll = select.poll()
        self.connections = {c.aio_get_fd(): c for c in connections}

    def add(self, connection, cookie, landed=None):
        """`landed` is called when the request has succeeded; it also keeps its buffer alive."""
        self.open.append((connection, cookie, landed))
        while len(self.open) >= self.depth:
            self.step()

    def write(self, connection, data, offset, flags=0, landed=None):
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        cookie = connection.aio_pwrite(buffer, offset, flags=flags)
        self.add(connection, cookie, lambda: (buffer, landed and landed()))

    def read(self, connection, count, offset, landed=lambda data: None):
        buffer = nbd.Buffer(count)
        cookie = connection.aio_pread(buffer, offset)
        self.add(connection, cookie, lambda: landed(buffer.to_bytearray()))

    def wait(self):
        """Waits until something has come in on a connection, or can go out."""
        for fd, connection in self.connections.items():
            direction = connection.aio_get_direction()
            events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
            events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            self.poll.register(fd, events)
        ready = self.poll.poll(60_000)
        assert ready, f"no answer to {len(self.open)} requests within a minute"
        return ready

    def step(self):
        """Ends the requests that are answered; waits for a first one."""
        for fd, events in self.wait():
            connection = self.connections[fd]
            direction = connection.aio_get_direction()
            if events & (select.POLLIN | select.POLLHUP) and direction & nbd.AIO_DIRECTION_READ:
                connection.aio_notify_read()
            elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                connection.aio_notify_write()
        still_open, landed = [], []
        for flying in self.open:
            if flying[0].aio_command_completed(flying[1]):
                landed.append(flying[2])
            else:
                still_open.append(flying)
        # `landed` may put the next request into the air.
        self.open = still_open
        for then in landed:
            if then:
                then()

    def finish(self):
        while self.open:
            self.step()


class Model:
    """A part of the disk and the bytes it should hold; random requests go to both.

    With `flight` the next request is sent when the one before has succeeded, so
    several models over parts of one disk have requests in flight together.
    """

    def __init__(self, connections, content, seed, offset=0):
        self.connections = connections
        self.content = bytearray(content)
        self.offset = offset
        self.seed = seed
        self.random = random.Random(seed)
        # On a file system that can't zero a range while it keeps the space,
        # FAST_ZERO is refused, and must then have done nothing.
        self.fast = connections[0].can_fast_zero()

    def span(self):
        size = len(self.content)
        kind = self.random.random()
        if kind < 0.4:
            length = self.random.randint(1, 700)
        elif kind < 0.7:
            length = 4096 * self.random.randint(1, 8)
        else:
            length = self.random.randint(1, 200_000)
        length = min(length, size)
        start = self.random.randint(0, size - length)
        kind = self.random.random()
        if kind < 0.3:
            # Whole blocks are a path of their own, and random offsets seldom meet one.
            start = start // 65536 * 65536
        elif kind < 0.6:
            start = start // 512 * 512
        elif kind < 0.7:
            # The last block may be a partial one.
            start = size - length
        return start, start + length

    def run(self, steps):
        for _ in range(steps):
            c = self.random.choice(self.connections)
            start, end = self.span()
            at, count = self.offset + start, end - start
            kind = self.choose()
            if kind == "write":
                data = self.data(count)
                c.pwrite(data, at, self.random.choice([0, 0, 0, FUA]))
                self.content[start:end] = data
            elif kind == "zero":
                self.zero(c, start, end)
            elif kind == "trim":
                c.trim(count, at)
                self.trimmed(c, c.pread(count, at), start, end)
            elif kind == "cache":
                c.cache(count, at)
            elif kind == "flush":
                c.flush()
            else:
                same(c.pread(count, at), self.content[start:end], at)
        return self

    def zero(self, c, start, end):
        flags = self.random.choice([0, NO_HOLE, FUA, FAST, FAST | NO_HOLE])
        if not self.fast:
            flags &= ~FAST
        try:
            c.zero(end - start, self.offset + start, flags)
            self.content[start:end] = bytes(end - start)
        except nbd.Error as error:
            assert flags & FAST and flags & NO_HOLE and error.errno == "ENOTSUP", error

    def trimmed(self, c, found, start, end):
        check_trimmed(c, found, self.content[start:end], self.offset + start)
        self.content[start:end] = found

    def fly(self, flight, steps):
        """As `run`, but with one request in flight when this returns."""
        if steps == 0:
            return
        c = self.random.choice(self.connections)
        start, end = self.span()
        at, count = self.offset + start, end - start
        kind = self.choose()

        def landed(new=None):
            if new is not None:
                self.content[start:end] = new
            self.fly(flight, steps - 1)

        def read(data):
            same(data, self.content[start:end], at)
            self.fly(flight, steps - 1)

        if kind == "write":
            data = self.data(count)
            flight.write(c, data, at, landed=lambda: landed(data))
        elif kind == "zero":
            flight.add(c, c.aio_zero(count, at), lambda: landed(bytes(count)))
        elif kind == "trim":
            def look(found):
                self.trimmed(c, found, start, end)
                self.fly(flight, steps - 1)

            flight.add(c, c.aio_trim(count, at), lambda: flight.read(c, count, at, look))
        elif kind == "cache":
            flight.add(c, c.aio_cache(count, at), landed)
        elif kind == "flush":
            flight.add(c, c.aio_flush(), landed)
        else:
            flight.read(c, count, at, read)

    def choose(self):
        kinds = ["write"] * 8 + ["read"] * 6 + ["zero", "trim", "trim", "zero", "cache", "flush"]
        return self.random.choice(kinds)

    def data(self, count):
        if self.random.random() < 0.1:
            return bytes(count)
        return self.random.randbytes(count)

    def check(self):
        for c in self.connections:
            size = len(self.content)
            found = read(c, self.offset, size, step=self.random.choice([65536, 99_999, 1 << 20]))
            same(found, self.content, self.offset)


def neighbours(connections, content, count, seed):
    """Models of adjoining parts of one disk, whose borders are in the middle of blocks."""
    borders = sorted(random.Random(seed).sample(range(1, len(content)), count - 1))
    borders = [0, *borders, len(content)]
    return [
        Model(connections, content[start:end], seed + start, start)
        for start, end in zip(borders, borders[1:])
    ]


def fly_together(models, steps):
    flight = Flight(models[0].connections, len(models) + 1)
    for model in models:
        model.fly(flight, steps)
    flight.finish()
    for model in models:
        model.check()
