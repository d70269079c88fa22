"""The disk as it should be: its bytes in a sparse file, and what each block is.

The file is as large as the image's virtual size, so that it can be compared with
qemu-img; what is to be said of the blocks lies beside it as JSON, so that the
next nbdkit's client can go on with both.
"""

import ctypes
import json

LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH_AND_KEEP_SIZE = 3
NEAR = 300_000


class Disk:
    def __init__(self, h, path, block, seed, copies=False):
        self.h = h
        self.block = block
        self.copies = copies
        self.random = random.Random(seed)
        self.size = h.get_size()
        self.blocks = -(-self.size // block)
        self.file = os.open(path, os.O_RDWR)
        self.about = path + ".json"
        # [first block, state], each as far as the next.
        self.runs = [[0, "base"]]
        if os.path.exists(self.about):
            self.runs = json.load(open(self.about))

    def save(self):
        json.dump(self.runs, open(self.about, "w"))

    # What the blocks are.

    def state(self, block):
        return self.runs[self.run_of(block)][1]

    def run_of(self, block):
        low, high = 0, len(self.runs)
        while high - low > 1:
            middle = (low + high) // 2
            if self.runs[middle][0] <= block:
                low = middle
            else:
                high = middle
        return low

    def set(self, first, end, state):
        if first >= end:
            return
        low, high = self.run_of(first), self.run_of(end - 1)
        new = [[first, state]]
        if self.runs[low][0] < first:
            new.insert(0, self.runs[low])
        if end < self.blocks and (high + 1 == len(self.runs) or self.runs[high + 1][0] > end):
            new.append([end, self.runs[high][1]])
        self.runs[low:high + 1] = new
        merged = self.runs[:max(0, low - 1)]
        for run in self.runs[max(0, low - 1):]:
            if not merged or merged[-1][1] != run[1]:
                merged.append(run)
        self.runs = merged

    def stored(self, block):
        """The block's bytes were handed to the overlay; zeroes need no space there."""
        if self.state(block) != "data":
            now = self.bytes(block * self.block, self.block)
            self.set(block, block + 1, "data" if any(now) else "zero")

    def touched(self, start, end):
        return range(start // self.block, -(-end // self.block))

    def whole(self, start, end):
        """(first, end) of the blocks that the range has all bytes of."""
        first = -(-start // self.block)
        return first, max(first, self.blocks if end == self.size else end // self.block)

    # Its bytes.

    def bytes(self, start, length):
        return os.pread(self.file, length, start)

    def clear(self, start, end):
        length = ctypes.c_longlong(end - start)
        done = LIBC.fallocate(self.file, PUNCH_AND_KEEP_SIZE, ctypes.c_longlong(start), length)
        assert done == 0, os.strerror(ctypes.get_errno())

    # Requests.

    def write(self, start, data, flags=0):
        self.h.pwrite(data, start, flags)
        assert os.pwrite(self.file, data, start) == len(data)
        for block in self.touched(start, start + len(data)):
            self.stored(block)

    def zero(self, start, end, flags=0):
        self.h.zero(end - start, start, flags)
        self.cleared(start, end, flags & NO_HOLE)

    def trim(self, start, end, flags=0):
        self.h.trim(end - start, start, flags)
        self.cleared(start, end, False, is_trim=True)

    def cleared(self, start, end, keeps_space, is_trim=False):
        touched, (first, last) = self.touched(start, end), self.whole(start, end)
        if first < last:
            self.clear(first * self.block, min(last * self.block, self.size))
        self.set(first, last, "data" if keeps_space else "zero")
        # At most two blocks have bytes before or after the range.
        for block in {touched[0], touched[-1]}:
            # A trim of a part of a block must not take space.
            if first <= block < last or is_trim and self.state(block) == "base":
                continue
            self.clear(max(start, block * self.block), min(end, (block + 1) * self.block))
            if keeps_space:
                self.set(block, block + 1, "data")
            elif any(self.bytes(block * self.block, self.block)):
                self.stored(block)
            else:
                self.set(block, block + 1, "zero")

    def read(self, start, end):
        same(self.h.pread(end - start, start), self.bytes(start, end - start), start)
        if self.copies:
            self.copied(start, end)

    def copied(self, start, end):
        for block in self.touched(start, end):
            if self.state(block) == "base":
                self.stored(block)

    # Random ones.

    def places(self):
        return [0, self.size // 3, self.size // 2, self.size // 10 * 9, self.size]

    def span(self):
        r = self.random
        cluster = 32 * self.block
        length = r.choice([
            r.randint(1, 700),
            self.block * r.randint(1, 40),
            r.randint(1, 200_000),
            cluster * r.randint(1, 2),
        ])
        length = min(length, self.size)
        if self.size > 64 * M:
            start = r.choice(self.places()) + r.randint(-NEAR, NEAR)
        else:
            start = r.randrange(self.size)
        unit = r.choice([1, 1, 512, self.block, cluster])
        start = max(0, min(start // unit * unit, self.size - length))
        if r.random() < 0.1:
            # The last block may be a partial one.
            start = self.size - length
        return start, start + length

    def long_span(self):
        """What a single trim may cover: whole L2 tables, and more than a window."""
        length = min(self.size, self.random.randrange(3 * G))
        start = self.random.choice(self.places()) + self.random.randint(-NEAR, NEAR)
        start = max(0, min(start, self.size - length))
        return start, start + length

    def step(self):
        r = self.random
        start, end = self.span()
        kind = r.choice(["write"] * 6 + ["again", "zeroes", "zero", "keep", "trim", "long", "read"])
        flags = r.choice([0, 0, 0, FUA])
        if kind == "write":
            self.write(start, r.randbytes(end - start), flags)
        elif kind == "again":
            self.write(start, r.randbytes(end - start))
            self.write(start, r.randbytes(max(1, (end - start) // 2)), flags)
        elif kind == "zeroes":
            self.write(start, bytes(end - start), flags)
        elif kind == "zero":
            self.zero(start, end, flags)
        elif kind == "keep":
            self.zero(start, end, flags | NO_HOLE)
        elif kind == "trim":
            self.trim(start, end, flags)
        elif kind == "read":
            self.read(start, end)
        elif r.random() < 0.2:
            start, end = self.long_span()
            r.choice([self.zero, self.trim])(start, end, flags)
        if r.random() < 0.1:
            self.h.flush()

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def check(self):
        """Reads what was ever written to, or all of a small disk."""
        if self.size <= 64 * M:
            ranges = [(0, self.size)]
        else:
            ranges = [(max(0, p - 2 * NEAR), min(self.size, p + 2 * NEAR)) for p in self.places()]
        for start, end in ranges:
            same(read(self.h, start, end - start), self.bytes(start, end - start), start)
        return self
