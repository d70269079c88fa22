"""A file system in user space (FUSE), with answers about space as some real ones give them.

fuse.py MOUNTPOINT KIND SIZE: mounts itself, and ends when it is unmounted. Of its SIZE bytes,

  length   files take what was written, but are said to take their length; and a file that
           is given a second name is another file from then on (as with sshfs);
  unknown  as "length", and it does not tell how much is free;
  data     files take their length: holes are stored.
"""

import ctypes
import errno
import os
import stat
import struct
import sys

POINT, KIND, SIZE = sys.argv[1], sys.argv[2], int(sys.argv[3])
BLOCK = 4096
ROOT = 1


class Content:
    """What one or several nodes have in them."""

    def __init__(self):
        self.fd = os.memfd_create("content")
        self.users = 0  # names and open files

    def taken(self):
        about = os.fstat(self.fd)
        if not self.users:
            return 0
        return about.st_size if KIND == "data" else about.st_blocks * 512


class Node:
    def __init__(self, content, mode):
        self.content, self.mode, self.names = content, mode, 0


nodes = {ROOT: Node(None, stat.S_IFDIR | 0o755)}
names = {}


def new_node(content, mode):
    number = max(nodes) + 1
    nodes[number] = Node(content, mode)
    return number


def add_name(name, number):
    if name in names:
        raise OSError(errno.EEXIST, "exists")
    names[name] = number
    nodes[number].names += 1
    nodes[number].content.users += 1


def taken():
    return sum(content.taken() for content in {node.content for node in nodes.values()} - {None})


def attributes(number):
    node = nodes[number]
    size = os.fstat(node.content.fd).st_size if node.content else BLOCK
    links = node.names if node.content else 2
    return struct.pack("<6Q10I", number, size, -(-size // 512), 0, 0, 0, 0, 0, 0,
                       node.mode, links, 0, 0, 0, BLOCK, 0)


def entry(number):
    return struct.pack("<4Q2I", number, 0, 0, 0, 0, 0) + attributes(number)


def resize(content, size):
    """To `size` bytes if there is space for it."""
    more = size - os.fstat(content.fd).st_size
    if KIND == "data" and more > 0 and taken() + more > SIZE:
        raise OSError(errno.ENOSPC, "full")
    os.ftruncate(content.fd, size)


def name_in(data):
    return data[:data.index(b"\0")]


def lookup(_, data):
    if name_in(data) not in names:
        raise OSError(errno.ENOENT, "no such name")
    return entry(names[name_in(data)])


def getattr_(number, _):
    return struct.pack("<Q2I", 0, 0, 0) + attributes(number)


def setattr_(number, data):
    valid, _, _, size = struct.unpack_from("<2I2Q", data)
    if valid & 8:
        resize(nodes[number].content, size)
    if valid & 1:
        nodes[number].mode = struct.unpack_from("<I", data, 68)[0]
    return getattr_(number, data)


def create(_, data):
    number = new_node(Content(), struct.unpack_from("<2I", data)[1])
    add_name(name_in(data[16:]), number)
    return entry(number) + open_(number, data)


def open_(number, _):
    if nodes[number].content:
        nodes[number].content.users += 1
    return struct.pack("<Q2I", 0, 0, 0)


def release(number, _):
    nodes[number].content.users -= 1
    return b""


def read(number, data):
    offset, size = struct.unpack_from("<QI", data, 8)
    return os.pread(nodes[number].content.fd, size, offset)


def write(number, data):
    offset, size = struct.unpack_from("<QI", data, 8)
    content = nodes[number].content
    resize(content, max(os.fstat(content.fd).st_size, offset + size))
    return struct.pack("<2I", os.pwrite(content.fd, data[40:40 + size], offset), 0)


def unlink(_, data):
    node = nodes[names.pop(name_in(data))]
    node.names -= 1
    node.content.users -= 1
    return b""


def link(_, data):
    old = nodes[struct.unpack_from("<Q", data)[0]]
    number = new_node(old.content, old.mode)
    add_name(name_in(data[8:]), number)
    return entry(number)


def statfs(_, __):
    blocks = 0 if KIND == "unknown" else SIZE // BLOCK
    free = 0 if KIND == "unknown" else (SIZE - taken()) // BLOCK
    return struct.pack("<5Q4I24x", blocks, free, free, 1000, 1000, BLOCK, 255, BLOCK, 0)


def readdir(_, data):
    offset, = struct.unpack_from("<Q", data, 8)
    listing = b""
    for at, (name, number) in list(enumerate(names.items(), 1))[offset:]:
        record = struct.pack("<2Q2I", number, at, len(name), stat.S_IFREG >> 12) + name
        listing += record + bytes(-len(record) % 8)
    return listing


def nothing(_, __):
    return b""


def init(_, __):
    return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 0, 0, 1 << 17, 1, 0, 0, *[0] * 8)


REQUESTS = {1: lookup, 3: getattr_, 4: setattr_, 10: unlink, 13: link, 14: open_, 15: read,
            16: write, 17: statfs, 18: release, 20: nothing, 26: init, 27: open_, 28: readdir,
            29: nothing, 30: nothing, 35: create}
NO_ANSWER = {2, 36, 42}  # forget, interrupt, batch_forget


def answer(opcode, number, data):
    try:
        return 0, REQUESTS[opcode](number, data)
    except KeyError:
        return errno.ENOSYS, b""
    except OSError as error:
        return error.errno, b""


def main():
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"cow-test", POINT.encode(), b"fuse", 0, options.encode()) != 0:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    while True:
        try:
            request = os.read(device, (1 << 17) + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        _, opcode, unique, number = struct.unpack_from("<2I2Q", request)
        if opcode in NO_ANSWER:
            continue
        failed, data = answer(opcode, number, request[40:])
        os.write(device, struct.pack("<IiQ", 16 + len(data), -failed, unique) + data)


main()
