"""Tests of picture decoding: rotation, transparency, every mode, and bounded memory."""

import json
import os
import struct
import subprocess
import sys
import threading
import types
import warnings
import zlib

import numpy as np
import pytest
from graft_pack.trainers.data import pictures, pixel_formats
from graft_pack.trainers.data.pictures import FileSource, MaskSource, measure_file, reading
from graft_pack.trainers.errors import DatasetError
from PIL import Image, PngImagePlugin

from tests.support import odd_files
from tests.support.pack import ROOT


def source(path):
    size, digest, _ = measure_file(str(path), path.name)
    return size, FileSource(str(path), path.name, str(path.parent), digest)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, size, depth, color, rows, *chunks):
    """Write a PNG by the standard; Pillow writes few of its modes.

    Args:
        color: the standard's color type.
        rows: the samples' bytes of each row.
        chunks: (kind, data) before the pixels.
    """
    head = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(b"\0" + row) for row in rows) + packer.flush()
    more = b"".join(chunk(*one) for one in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", data) + chunk(b"IEND", b""))


TIFF_MODES = ("RGB", "L", "1", "I;16", "I", "F", "CMYK", "P", "LA", "RGBA")


def in_mode(picture, mode):
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        gray = np.asarray(picture.convert("L")).astype(kind)
        return Image.fromarray(gray * (1 if mode == "F" else 257))
    return picture.convert(mode)


@pytest.mark.parametrize("more", [{}, {"compression": "tiff_lzw"}, {"save_all": True}], ids=["raw", "lzw", "pages"])
@pytest.mark.parametrize("mode", TIFF_MODES)
def test_turned_tiff_has_the_size_and_the_look_of_a_viewer(tmp_path, mode, more):
    picture = in_mode(Image.fromarray(odd_files.quarters(1)), mode)
    upright = np.asarray(pixel_formats.upright_rgb(picture))
    for orientation, shown in odd_files.SHOWN.items():
        path = tmp_path / f"{orientation}.tif"
        pages = {"append_images": [picture]} if more.get("save_all") else {}
        picture.save(path, tiffinfo={274: orientation}, **more, **pages)
        size, file = source(path)
        opened = file.open()
        assert size == opened.size, orientation
        assert np.array_equal(np.asarray(opened), shown(upright)), orientation


def clear_mask(tmp_path, kind):
    """Write a white mask of 32 x 16 with a transparent left half, in a mode that supports transparency."""
    path = tmp_path / "a-masklabel.png"
    clear = np.arange(32) < 16
    opacity = Image.fromarray(np.tile(np.where(clear, 0, 255).astype(np.uint8), (16, 1)))
    white = Image.new("RGBA", (32, 16), "white")
    white.putalpha(opacity)
    palette = Image.fromarray(np.tile(clear.astype(np.uint8), (16, 1)))
    palette.putpalette([255] * 6)
    if kind in ("LA", "RGBA"):
        white.convert(kind).save(path)
    elif kind == "WebP":
        path = path.with_suffix(".webp")
        white.save(path, lossless=True, exact=True)
    elif kind == "PA":
        path = path.with_suffix(".tif")
        palette = palette.convert("PA")
        palette.putalpha(opacity)
        palette.save(path)
    elif kind == "GIF":
        path = path.with_suffix(".gif")
        palette.save(path, transparency=1)
    elif kind == "P":
        palette.save(path, transparency=1)
    elif kind == "P by index":
        rows = [bytes(clear.astype(np.uint8))] * 16
        write_png(path, (32, 16), 8, 3, rows, (b"PLTE", b"\xff" * 6), (b"tRNS", b"\xff\x00"))
    else:
        channels, depth = (3, int(kind[3:])) if kind.startswith("RGB") else (1, int(kind[1:]))
        top = 2**depth - 1
        # Colors of 16 bits are read as 8 bits, so the values must differ there.
        other = top - (256 if channels == 3 and depth == 16 else 1)
        values = np.repeat(np.where(clear, other, top), channels)
        bits = (values[:, None] >> np.arange(depth)[::-1] & 1).astype(np.uint8).ravel()
        row = np.packbits(bits).tobytes()
        value = struct.pack(">H", other) * channels
        write_png(path, (32, 16), depth, 2 if channels == 3 else 0, [row] * 16, (b"tRNS", value))
    return path


CLEAR = ("LA", "RGBA", "P", "P by index", "PA", "GIF", "WebP", "L1", "L2", "L4", "L8", "L16", "RGB8", "RGB16")


@pytest.mark.parametrize("kind", CLEAR)
def test_clear_part_of_a_mask_does_not_count(tmp_path, kind):
    path = clear_mask(tmp_path, kind)
    _, file = source(path)
    assert pictures.is_clear(file)
    weight = np.asarray(MaskSource(file, True).open())
    assert weight.shape == (16, 32)
    assert weight[:, :16].max() == 0
    assert weight[:, 16:].min() == 255
    # In a picture the same part is white, as a viewer shows it.
    assert np.asarray(file.open())[:, :16].min() == 255


def test_half_clear_part_of_a_mask_counts_half(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (200, 200, 200, 128)).save(path)
    assert np.asarray(MaskSource(source(path)[1], True).open()).max() == round(200 * 128 / 255)


def test_opaque_mask_keeps_its_digest_and_its_bits(tmp_path):
    gray = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 32, 3)).astype(np.uint8))
    path = tmp_path / "a.png"
    for mask in (gray, gray.convert("RGBA")):
        mask.save(path)
        _, file = source(path)
        assert not pictures.is_clear(file)
        assert MaskSource(file, False).digest == file.digest
        assert np.array_equal(np.asarray(MaskSource(file, False).open()), np.asarray(gray.convert("L")))


def modes():
    """Yield a picture in each mode, with Pillow's own conversion of the whole picture."""
    rng = np.random.RandomState(0)
    rgba = Image.fromarray(rng.randint(0, 256, (64, 96, 4)).astype(np.uint8))
    white = Image.new("RGBA", rgba.size, "white")
    for mode in ("RGBA", "LA"):
        shown = rgba.convert(mode)
        yield mode, shown, Image.alpha_composite(white, shown.convert("RGBA")).convert("RGB")
    for mode in ("RGB", "L", "1", "CMYK", "YCbCr"):
        shown = rgba.convert("RGB").convert(mode)
        yield mode, shown, shown.convert("RGB")
    deep = rng.randint(0, 65536, (64, 96))
    yield "I;16", Image.fromarray(deep.astype(np.uint16)), Image.fromarray(np.round(deep / 257).astype(np.uint8))
    for top in (1.0, 255.0):
        # Only the last strip contains the brightest pixel.
        values = rng.rand(64, 96) * top * 0.003
        values[-1, -1] = top
        yield (
            f"F {top}",
            Image.fromarray(values.astype(np.float32)),
            Image.fromarray(np.floor(values.astype(np.float32).astype(float) / top * 255 + 0.5).astype(np.uint8)),
        )


def test_strips_give_the_bits_of_the_whole(monkeypatch):
    for strip in (1, 500, 1 << 18):
        monkeypatch.setattr(pixel_formats, "_STRIP", strip)
        for name, picture, whole in modes():
            made = np.asarray(pixel_formats.upright_rgb(picture))
            assert np.array_equal(made, np.asarray(whole.convert("RGB"))), (name, strip)


_PEAK = """
import json, sys, types
package = types.ModuleType("graft_pack")
package.__path__ = [sys.argv[1]]
sys.modules["graft_pack"] = package
from graft_pack.trainers.data import pictures
from graft_pack.trainers.inspection import near_duplicates
from PIL import Image, ImageCms

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

found = {}
for path in sys.argv[3:]:
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    size, digest, _ = pictures.measure_file(path, path)
    file = pictures.FileSource(path, path, sys.argv[2], digest)
    rows = found[path] = {}
    for kind, use in (
        ("likeness", lambda: near_duplicates.signature(file.open())),
        ("mask", pictures.MaskSource(file, True).open),
        ("alpha", file.alpha),
    ):
        use()
        rows[kind] = (memory("VmHWM") - before) / (size[0] * size[1])
print(json.dumps(found))
"""
_SIDE = 2000


def bombs(folder):
    """Write files of few bytes and many pixels, in the formats and modes that take most memory."""
    side = (_SIDE, _SIDE)
    for color, channels, depth in ((0, 1, 16), (2, 3, 16), (4, 2, 16), (6, 4, 8)):
        row = b"\x40" * (_SIDE * channels * depth // 8)
        write_png(folder / f"{color}-{depth}.png", side, depth, color, [row] * _SIDE)
    columns = _SIDE * _SIDE // 64
    write_png(folder / "wide.png", (columns, 64), 16, 6, [b"\x40" * (8 * columns)] * 64)
    clear = (b"PLTE", bytes(768)), (b"tRNS", bytes(256))
    write_png(folder / "palette.png", side, 8, 3, [bytes(_SIDE)] * _SIDE, *clear)
    for mode in ("I;16", "I", "F"):
        Image.new(mode, side).save(folder / f"{mode[:1]}{len(mode)}.tif", compression="tiff_lzw", tiffinfo={274: 6})
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", side)
    picture.save(folder / "turned.jpg", progressive=True, subsampling=0, exif=exif)
    picture.convert("CMYK").save(folder / "cmyk.jpg", progressive=True)
    picture.save(folder / "a.webp", lossless=True, method=0)
    picture.save(folder / "a.gif")
    return sorted(folder.iterdir())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from /proc")
def test_memory_of_a_picture_stays_within_its_bound(tmp_path):
    files = bombs(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, str(ROOT), str(tmp_path), *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    peaks = json.loads(found.stdout)
    assert len(peaks) == len(files)
    # Above the bound: one strip and its decoded form.
    bound = pictures.BYTES_PER_PIXEL + 24e6 / _SIDE**2
    assert {name: rows for name, rows in peaks.items() if max(rows.values()) > bound} == {}


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000)])
def test_a_picture_of_one_long_row_or_column_is_refused(tmp_path, size):
    write_png(tmp_path / "a.png", size, 16, 0, [bytes(2 * size[0])] * size[1])
    with pytest.raises(DatasetError, match=f"{size[0]}x{size[1]} has a side of more than 65535 pixels"):
        pictures.measure_file(str(tmp_path / "a.png"), "a.png")


def test_first_frame_of_many_is_read_alone(tmp_path):
    frames = [Image.new("P", (64, 64), number % 250) for number in range(2000)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    size, file = source(path)
    assert size == file.open().size == (64, 64)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """A stand-in for the package; only its plugin's class is used."""
    path = tmp_path / "a.heic"
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")

    class Plugin(PngImagePlugin.PngImageFile):
        def __init__(self, file, filename):
            odd_files._save(str(tmp_path), "inner.png", Image.fromarray(odd_files.quarters(1)))
            super().__init__(str(tmp_path / "inner.png"))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(HeifImageFile=Plugin))
    size, file = source(path)
    assert size == (96, 64)
    assert np.array_equal(np.asarray(file.open()), odd_files.quarters(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DatasetError, match=r"a\.heic.*install pillow-heif"):
        measure_file(str(path), path.name)


def test_reading_silences_its_own_thread_only(tmp_path):
    """Two threads whose readings overlap: the later one must not leave warnings silenced."""
    began, warned, ended = (threading.Barrier(2, timeout=10) for _ in range(3))

    def read_early():
        with reading("early"):
            warnings.warn("not heard", stacklevel=1)
            began.wait()
            warned.wait()
        ended.wait()

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=read_early)
        thread.start()
        began.wait()
        warnings.warn("heard meanwhile", stacklevel=1)
        with reading("late"):
            warned.wait()
            ended.wait()
            warnings.warn("not heard", stacklevel=1)
        thread.join()
        warnings.warn("heard later", stacklevel=1)
    assert [str(row.message) for row in heard] == ["heard meanwhile", "heard later"]
