"""Writes TensorFlow checkpoints without TensorFlow."""

import os

import google_crc32c

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8, "int64": 9}


def mask(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value):
    octets = bytearray()
    while value > 127:
        octets.append(value & 127 | 128)
        value >>= 7
    return bytes([*octets, value])


def message(*pairs):
    """A protocol buffer of (number, value): an int is a varint, bytes stay bytes, a list of one int is 4 bytes."""
    out = b""
    for number, value in pairs:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3 | 5) + value[0].to_bytes(4, "little")
    return out


def header(shards=1, big_endian=0, min_consumer=0):
    return message((1, shards), (2, big_endian), (3, message((1, 1), (2, min_consumer))))


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, crc=0, more=()):
    """A tensor's entry. As in real ones, zero fields are omitted."""
    dims = b"".join(message((2, message((1, n)) if n else b"")) for n in shape)
    numbers = [(number, value) for number, value in ((1, dtype), (3, shard), (4, offset), (5, size)) if value]
    return message((2, dims), *numbers, (6, [mask(crc)]), *more)


def block(items, interval=16):
    """A block of keys and values: each key omits the prefix it shares with the previous one, except every 16th."""
    out, restarts, previous = b"", [], b""
    for k, (key, value) in enumerate(items):
        shared = len(os.path.commonprefix([previous, key])) if k % interval else 0  # noqa: RUF071 (keys, not paths)
        if k % interval == 0:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return with_restarts(out, restarts or [0])


def with_restarts(entries, restarts):
    return entries + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def seal(contents, kind=0):
    whole = contents + bytes([kind])
    return whole + mask(google_crc32c.value(whole)).to_bytes(4, "little")


def table(blocks, kind=0, handles=None):
    """An index file of these data blocks; kind: the compression declared for them; handles: the places declared."""
    out, places = b"", []
    for contents in [*blocks, block([])]:
        places.append((len(out), len(contents)))
        out += seal(contents, kind)
    *places, metaindex = places
    index = block([(b"%06d" % k, varint(a) + varint(n)) for k, (a, n) in enumerate(handles or places)], 1)
    footer = b"".join(varint(n) for n in (*metaindex, len(out), len(index)))
    return out + seal(index) + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def write(folder, tensors, shards=1, big_endian=0, interval=16, keys_a_block=1000):
    """Write a bundle of name -> (dtype, shape, numbers as one byte string), tensors dealt out over the shards."""
    parts, items = [b""] * shards, []
    for k, name in enumerate(sorted(tensors, key=str.encode)):
        dtype, shape, numbers = tensors[name]
        shard = k % shards
        place = {"shard": shard, "offset": len(parts[shard]), "size": len(numbers), "crc": google_crc32c.value(numbers)}
        items.append((name.encode(), entry(DTYPES[dtype], shape, **place)))
        parts[shard] += numbers
    items.insert(0, (b"", header(shards, big_endian)))
    blocks = [block(items[k : k + keys_a_block], interval) for k in range(0, len(items), keys_a_block)]
    (folder / "m.index").write_bytes(table(blocks))
    for shard, part in enumerate(parts):
        (folder / f"m.data-{shard:05d}-of-{shards:05d}").write_bytes(part)
    return folder / "m"


def index(*blocks, **claims):
    return {"m.index": table(blocks, **claims)}
