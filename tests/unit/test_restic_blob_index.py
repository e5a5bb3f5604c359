"""Finding blobs among millions: what is found, against a dictionary; and how much memory that takes."""

import gc
import hashlib
import os
import tracemalloc
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.target.restic import crypto, index_file
from orchestrator.target.restic.blob_index import BlobIndex, IndexBuilder, Location
from orchestrator.target.restic.pack import BlobKind, Entry

MEASURED = int(os.environ.get("VMFLEECE_INDEX_BLOBS", "200000"))
"""A million blobs are the figure that is promised; fewer have a larger share of what is fixed."""

few_ids = st.binary(min_size=1, max_size=1).map(lambda one: one * 31) | st.binary(min_size=31, max_size=31)
entries = st.builds(
    Entry,
    st.sampled_from(BlobKind),
    st.tuples(st.sampled_from([b"\x00", b"\xff", b"a"]), few_ids).map(b"".join),
    st.integers(0, 2**31),
    st.integers(32, 2**31 - 1),
    st.none() | st.integers(1, 2**30),
)
packs = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.lists(entries, max_size=100)), max_size=5)


Listed = tuple[bytes, list[Entry]]
KEY = crypto.generate()


def built(*files: list[Listed]) -> BlobIndex:
    builder = IndexBuilder()
    for file in files:
        for table in index_file.open_sealed(index_file.seal(file, KEY), KEY, file="index/1"):
            builder.add(table)
    return builder.finish()


@given(packs, packs)
def test_it_finds_what_a_dictionary_finds(loaded: list[Listed], added: list[Listed]) -> None:
    index = built(loaded)
    expected: dict[tuple[BlobKind, bytes], set[Location]] = defaultdict(set)
    for pack, listed in added:
        index.add(pack, listed)
    for pack, listed in loaded + added:
        for entry in listed:
            expected[entry.kind, entry.identity].add(Location(pack, entry))
    for (kind, identity), locations in expected.items():
        assert set(index.find(kind, identity)) == locations
        assert index.has(kind, identity)
        (length,) = index.lengths(kind, [identity])
        assert length in {location.entry.content_bytes for location in locations}
        other = BlobKind.TREE if kind is BlobKind.DATA else BlobKind.DATA
        assert index.has(other, identity) is ((other, identity) in expected)
        assert index.find(other, identity) or (other, identity) not in expected
        assert index.lengths(other, [identity]) != [None] or (other, identity) not in expected


def test_lengths_are_in_the_order_of_what_is_asked_for() -> None:
    index = built([(bytes(32), [Entry(BlobKind.DATA, b"a" * 32, 0, 99, None)])])
    index.add(b"q" * 32, [Entry(BlobKind.DATA, b"b" * 32, 0, 50, 70), Entry(BlobKind.TREE, b"c" * 32, 50, 50, 80)])
    asked = [b"c" * 32, b"b" * 32, b"a" * 32, b"b" * 32, bytes(32)]
    assert index.lengths(BlobKind.DATA, asked) == [None, 70, 67, 70, None]
    assert index.lengths(BlobKind.TREE, asked) == [80, None, None, None, None]


def test_an_id_in_the_midst_of_another_record_is_not_found() -> None:
    wanted = bytes([7, 7] + [0] * 30)
    fake = bytes([7] * 8) + bytes(24)
    index = built(
        [(bytes(32), [Entry(BlobKind.DATA, fake, 0, 32, None), Entry(BlobKind.DATA, wanted, 0, 99, None)])]
    )
    assert [place.entry.length for place in index.find(BlobKind.DATA, wanted)] == [99]
    assert index.find(BlobKind.DATA, bytes([7, 7]) + bytes([7] * 6) + bytes(24)) != []
    assert index.find(BlobKind.DATA, bytes([7] * 7) + bytes(25)) == []


def test_a_pack_that_two_index_files_list_is_known_once() -> None:
    entry = Entry(BlobKind.DATA, bytes(32), 0, 99, None)
    index = built([(b"p" * 32, [entry]), (b"q" * 32, [entry])], [(b"p" * 32, [entry])])
    assert len(index) == 2
    assert {place.pack for place in index.find(BlobKind.DATA, bytes(32))} == {b"p" * 32, b"q" * 32}


def test_it_takes_64_bytes_a_blob_also_while_it_grows() -> None:
    def pack(number: int) -> tuple[bytes, list[Entry]]:
        ids = (hashlib.sha256(b"%d %d" % (number, blob)).digest() for blob in range(8))
        listed = [Entry(BlobKind.DATA, identity, at << 22, 4 << 20, None) for at, identity in enumerate(ids)]
        return hashlib.sha256(b"%d" % number).digest(), listed

    gc.collect()
    tracemalloc.start()
    try:
        half = [pack(number) for number in range(MEASURED // 16)]
        index = built(*(half[at : at + 2500] for at in range(0, len(half), 2500)))
        del half
        for number in range(MEASURED // 16, MEASURED // 8):
            index.add(*pack(number))
        gc.collect()
        used, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == MEASURED // 8 * 8
    print(f"{used / MEASURED:.1f} bytes a blob, {peak / MEASURED:.1f} at most")  # noqa: T201  shown by -rP
    assert used <= 64 * MEASURED
    assert index.has(BlobKind.DATA, pack(5)[1][3].identity)
    assert index.has(BlobKind.DATA, pack(MEASURED // 8 - 1)[1][0].identity)
