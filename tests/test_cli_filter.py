"""`lowrank filter` on files: formats, sample types, pages, alpha, damage and failing writes."""

import json
import os
import re
import resource
import struct
import sys
import zlib

import numpy as np
import pytest

from lowrank import cli, filters

pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")
GAUSS = filters.gauss(2.0)


@pytest.fixture
def tifffile():
    return pytest.importorskip("tifffile")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run ``lowrank filter`` in a temporary folder; return the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lowrank", "filter", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def done(run):
    """Run ``lowrank filter`` successfully; return its first line."""

    def call(*words):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        return out.splitlines()[0]

    return call


def samples(rng, shape, dtype=np.uint8):
    """Return samples over the whole range of a type."""
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def opened(name):
    with Image.open(name) as image:
        image.load()
        return image


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png16(name, values, line_filter=1, extra=()):
    """Write a 16-bit PNG with filter 0 (none) or 1 (differences to the left)."""
    height, width, count = (*values.shape, 1)[:3]
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    if line_filter:
        rows = np.diff(rows.reshape(height, width, -1), axis=1, prepend=np.uint8(0))
    lines = np.insert(rows.reshape(height, -1), 0, line_filter, axis=1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), *extra]
    parts += [(b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    with open(name, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts))


def read_png16(name):
    """Return the samples of a 16-bit PNG whose rows are differences to the rows above."""
    with open(name, "rb") as file:
        data = file.read()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 16
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    lines = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8)
    lines = lines.reshape(height, -1)
    assert (lines[:, 0] == 2).all()
    rows = np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8)
    count = {0: 1, 4: 2, 2: 3, 6: 4}[kind]
    return np.squeeze(rows.view(">u2").reshape(height, width, count).astype(np.uint16))


# Pictures


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_8_bit_pngs_stay_8_bit_pngs(done, rng, mode):
    values = samples(rng, (40, 50) if mode == "L" else (40, 50, 3))
    Image.fromarray(values).save("a.png")
    line = done("a.png", "--kernel", "gauss")
    size = "40x50" if mode == "L" else "40x50 RGB"
    assert line.startswith(f"a.png: {size}, uint8 -> a.gauss.png, uint8: gauss 17x17")
    assert "separable h-w" in line
    found = opened("a.gauss.png")
    assert found.mode == mode
    np.testing.assert_array_equal(np.asarray(found), filters.correlate(values, GAUSS))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_kept_unless_asked(done, rng, mode):
    values = samples(rng, (40, 50, len(mode)))
    Image.fromarray(values).save("a.png")
    line = done("a.png", "--kernel", "gauss")
    assert {"LA": "grey with alpha", "RGBA": "RGBA"}[mode] in line
    assert "alpha kept" in line
    found = opened("a.gauss.png")
    assert found.mode == mode
    colours = filters.correlate(values[..., :-1], GAUSS)
    np.testing.assert_array_equal(np.asarray(found)[..., :-1], colours)
    np.testing.assert_array_equal(np.asarray(found)[..., -1], values[..., -1])
    line = done("a.png", "--kernel", "gauss", "--filter-alpha")
    assert "alpha kept" not in line
    found = np.asarray(opened("a.gauss.png"))
    np.testing.assert_array_equal(found, filters.correlate(values, GAUSS))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("line_filter", [0, 1])
def test_16_bit_pngs_keep_16_bits(done, rng, count, line_filter):
    values = samples(rng, (40, 50, count)[: 2 + (count > 1)], np.uint16)
    write_png16("a.png", values, line_filter)
    assert "uint16 -> a.gauss.png, uint16" in done("a.png", "--kernel", "gauss")
    expected = values.copy()
    colours = slice(count - 1 if count in (2, 4) else count)
    if count == 1:
        expected = filters.correlate(values, GAUSS)
    else:
        expected[..., colours] = filters.correlate(values[..., colours], GAUSS)
    np.testing.assert_array_equal(read_png16("a.gauss.png"), expected)
    # Pillow keeps the high bytes of several samples per pixel.
    shown = np.asarray(opened("a.gauss.png"))
    if count == 1:
        np.testing.assert_array_equal(shown, expected)
    elif count > 2:
        np.testing.assert_array_equal(shown, expected >> 8)


def test_a_transparent_colour_becomes_alpha(done, rng):
    values = samples(rng, (20, 30, 3))
    values[3:5] = 7, 8, 9
    Image.fromarray(values).save("a.png", transparency=(7, 8, 9))
    assert "transparent colour converted to alpha; alpha kept" in done("a.png", "--kernel", "box")
    found = np.asarray(opened("a.box.png"))
    assert found.shape == (20, 30, 4)
    np.testing.assert_array_equal(found[..., 3], np.where((values == (7, 8, 9)).all(2), 0, 255))
    deep = samples(rng, (20, 30), np.uint16)
    deep[4:6] = 1000
    write_png16("b.png", deep, extra=[(b"tRNS", struct.pack(">H", 1000))])
    done("b.png", "--kernel", "box")
    np.testing.assert_array_equal(read_png16("b.box.png")[..., 1], np.where(deep == 1000, 0, 65535))


def test_1_bit_pngs_become_grey(done, rng):
    bits = samples(rng, (40, 50)) > 127
    Image.fromarray(bits).save("a.png")
    assert opened("a.png").mode == "1"
    assert "1 bit converted to 8-bit grey" in done("a.png", "--kernel", "gauss")
    found = np.asarray(opened("a.gauss.png"))
    np.testing.assert_array_equal(found, filters.correlate(bits * np.uint8(255), GAUSS))


@pytest.mark.parametrize("is_clear", [False, True])
def test_palettes_become_colours(done, rng, is_clear):
    indexed = Image.fromarray(samples(rng, (40, 50, 3))).quantize(16)
    options = {"transparency": 3} if is_clear else {}
    indexed.save("a.png", **options)
    mode = "RGBA" if is_clear else "RGB"
    assert f"palette converted to 8-bit {mode}" in done("a.png", "--kernel", "gauss")
    found = opened("a.gauss.png")
    assert found.mode == mode
    colours = filters.correlate(np.asarray(indexed.convert("RGB")), GAUSS)
    np.testing.assert_array_equal(np.asarray(found)[..., :3], colours)
    if is_clear:
        expected = np.where(np.asarray(indexed) == 3, 0, 255)
        np.testing.assert_array_equal(np.asarray(found)[..., 3], expected)


@pytest.mark.parametrize(
    ("ending", "lossless"), [("jpg", False), ("bmp", True), ("webp", True), ("ppm", True)]
)
def test_other_formats_stay_what_they_are(done, rng, ending, lossless):
    values = filters.correlate(samples(rng, (40, 50, 3)), filters.gauss(4.0))
    Image.fromarray(values).save(f"a.{ending}", lossless=True)
    read = np.asarray(opened(f"a.{ending}"))
    assert f"a.gauss.{ending}, uint8" in done(f"a.{ending}", "--kernel", "gauss")
    found = opened(f"a.gauss.{ending}")
    assert found.format == opened(f"a.{ending}").format
    # Quality 95 quantises no coefficient of these smooth pictures by more than a few levels.
    off = np.abs(np.asarray(found).astype(int) - filters.correlate(read, GAUSS)).max()
    assert off <= (0 if lossless else 4)


def test_profiles_orientation_and_resolution_are_kept(done, rng):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    values = samples(rng, (40, 50, 3))
    Image.fromarray(values).save("a.jpg", exif=exif, dpi=(300, 300), icc_profile=b"profile")
    done("a.jpg", "--kernel", "gauss")
    found = opened("a.gauss.jpg")
    assert found.getexif()[0x0112] == 6
    assert found.info["dpi"] == (300, 300)
    assert found.info["icc_profile"] == b"profile"
    write_png16(
        "b.png", values.astype(np.uint16), extra=[(b"iCCP", b"a\0\0" + zlib.compress(b"p"))]
    )
    done("b.png", "--kernel", "gauss")
    assert opened("b.gauss.png").info["icc_profile"] == b"p"


def test_cmyk_is_converted(done, rng):
    Image.frombytes("CMYK", (50, 40), rng.bytes(40 * 50 * 4)).save("a.jpg")
    assert "CMYK converted to 8-bit RGB" in done("a.jpg", "--kernel", "gauss")
    assert opened("a.gauss.jpg").mode == "RGB"


def test_grey_maps_keep_16_bits(done, rng, tmp_path):
    values = samples(rng, (40, 50), np.uint16)
    Image.fromarray(values).save("a.pgm")
    assert "uint16 -> a.gauss.pgm, uint16" in done("a.pgm", "--kernel", "gauss")
    found = np.asarray(opened("a.gauss.pgm"))
    np.testing.assert_array_equal(found, filters.correlate(values, GAUSS))
    (tmp_path / "b.ppm").write_bytes(b"P6 5 4 65535 " + rng.bytes(4 * 5 * 6))
    assert "16 bits read as 8" in done("b.ppm", "--kernel", "gauss")


def test_gifs_become_pngs_which_hold_more_colours(done, rng):
    Image.fromarray(samples(rng, (40, 50, 3))).quantize(16).save("a.gif")
    assert "uint8 -> a.gauss.png, uint8" in done("a.gif", "--kernel", "gauss")


def test_animations_are_refused(run, rng):
    frames = [Image.fromarray(samples(rng, (8, 9))) for _ in range(3)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    code, out, err = run("a.gif", "--kernel", "gauss")
    assert (code, out) == (2, "")
    assert re.search(r"a\.gif.*3 frames.*TIFF", err)


# TIFF


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "byteorder": ">"}])
def test_a_stack_of_uint16_pages_stays_one(done, rng, tifffile, options):
    stack = samples(rng, (20, 40, 50), np.uint16)
    tifffile.imwrite("a.tif", stack, photometric="minisblack", **options)
    line = done("a.tif", "--kernel", "gauss")
    assert "a.tif: 20 pages of 40x50, uint16 -> a.gauss.tif, uint16: gauss 17x17" in line
    assert "along axes 1,2" in line
    with tifffile.TiffFile("a.gauss.tif") as tiff:
        assert len(tiff.pages) == 20
        assert (tiff.pages[0].compression.value == 1) == (not options)
        found = tiff.asarray()
    assert found.dtype == np.uint16
    for page, expected in zip(found, stack):
        np.testing.assert_array_equal(page, filters.correlate(expected, GAUSS))


def test_a_kernel_of_three_axes_filters_the_stack(done, rng, tifffile):
    stack = samples(rng, (20, 24, 26), np.uint16)
    tifffile.imwrite("a.tif", stack, photometric="minisblack")
    assert "along" not in done("a.tif", "--kernel", "gauss", "--ndim", "3")
    expected = filters.correlate(stack, filters.gauss(2.0, ndim=3))
    np.testing.assert_array_equal(tifffile.imread("a.gauss.tif"), expected)
    assert "along axes 0" in done("a.tif", "--kernel", "gauss", "--ndim", "1", "--axes", "0")
    expected = filters.correlate(stack, filters.gauss(2.0, ndim=1), axes=[0])
    np.testing.assert_array_equal(tifffile.imread("a.gauss.tif"), expected)


def test_pages_written_one_by_one_are_a_stack(done, rng, tifffile):
    pages = samples(rng, (5, 24, 26), np.uint8)
    first, *rest = map(Image.fromarray, pages)
    first.save("a.tiff", save_all=True, append_images=rest)
    assert "5 pages of 24x26" in done("a.tiff", "--kernel", "gauss")
    found = tifffile.imread("a.gauss.tiff")
    np.testing.assert_array_equal(found, filters.correlate(pages, GAUSS, axes=(1, 2)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32"])
def test_tiffs_keep_their_sample_type(done, rng, tifffile, dtype):
    values = samples(rng, (40, 50), dtype)
    tifffile.imwrite("a.tif", values)
    for name in ("gauss", "sobel"):
        assert f"{dtype} -> a.{name}.tif, {dtype}" in done("a.tif", "--kernel", name)
        found = tifffile.imread(f"a.{name}.tif")
        assert found.dtype == dtype
        kernel = GAUSS if name == "gauss" else filters.sobel()
        np.testing.assert_array_equal(found, filters.correlate(values, kernel))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiffs_keep_alpha_and_layout(done, rng, tifffile, planar, dtype):
    shape = (40, 50, 4) if planar == "contig" else (4, 40, 50)
    axis = shape.index(4)
    values = samples(rng, shape, dtype)
    options = {"photometric": "rgb", "planarconfig": planar, "extrasamples": ["assocalpha"]}
    tifffile.imwrite("a.tif", values, **options, resolution=(300, 200), resolutionunit="CENTIMETER")
    line = done("a.tif", "--kernel", "gauss")
    assert "40x50 RGBA" in line
    assert "alpha kept" in line
    with tifffile.TiffFile("a.gauss.tif") as tiff:
        page, found = tiff.pages[0], tiff.asarray()
        assert [e.name for e in page.extrasamples] == ["ASSOCALPHA"]
        assert page.planarconfig.name == planar.upper()
        assert page.resolution == (300, 200)
        assert page.resolutionunit.name == "CENTIMETER"
    colours, alpha = np.take(values, [0, 1, 2], axis), np.take(values, 3, axis)
    axes = [a for a in range(3) if a != axis]
    np.testing.assert_array_equal(np.take(found, 3, axis), alpha)
    np.testing.assert_array_equal(
        np.take(found, [0, 1, 2], axis), filters.correlate(colours, GAUSS, axes=axes)
    )


def test_imagej_stacks_keep_axes_and_spacing(done, run, rng, tifffile):
    stack = samples(rng, (3, 6, 2, 24, 26), np.uint16)
    metadata = {"axes": "TZCYX", "spacing": 0.5, "unit": "um"}
    tifffile.imwrite("a.tif", stack, imagej=True, metadata=metadata, resolution=(2, 3))
    line = done("a.tif", "--kernel", "gauss", "--sigma", "1", "--ndim", "3")
    assert "3 T x 6 Z x 2 C pages of 24x26" in line
    assert "along axes 1,3,4" in line
    with tifffile.TiffFile("a.gauss.tif") as tiff:
        assert tiff.is_imagej
        assert tiff.series[0].axes == "TZCYX"
        assert tiff.imagej_metadata["spacing"] == 0.5
        assert tiff.imagej_metadata["unit"] == "um"
        assert tiff.pages[0].resolution == (2, 3)
        found = tiff.asarray()
    expected = filters.correlate(stack, filters.gauss(1.0, ndim=3), axes=(1, 3, 4))
    np.testing.assert_array_equal(found, expected)
    stack = stack[:, :, 0]
    tifffile.imwrite("b.tif", stack, photometric="minisblack", metadata={"axes": "TIYX"})
    code, _, err = run("b.tif", "--kernel", "gauss", "--ndim", "3")
    assert code == 2
    assert re.search("--axes must be given.*T,I,Y,X", err)


def test_ome_stacks_keep_their_axes(done, rng, tifffile):
    stack = samples(rng, (3, 2, 24, 26), np.uint16)
    tifffile.imwrite("a.ome.tif", stack, metadata={"axes": "ZCYX"}, photometric="minisblack")
    done("a.ome.tif", "--kernel", "gauss")
    with tifffile.TiffFile("a.gauss.ome.tif") as tiff:
        assert tiff.is_ome
        assert tiff.series[0].axes == "ZCYX"
        np.testing.assert_array_equal(tiff.asarray(), filters.correlate(stack, GAUSS, axes=(2, 3)))


def test_bits_palettes_and_compression_of_tiffs(done, rng, tifffile):
    bits = samples(rng, (40, 50)) > 127
    tifffile.imwrite("bits.tif", bits)
    assert "1 bit converted to 8-bit grey" in done("bits.tif", "--kernel", "gauss")
    grey = filters.correlate(bits * np.uint8(255), GAUSS)
    np.testing.assert_array_equal(tifffile.imread("bits.gauss.tif"), grey)
    Image.fromarray(bits).save("g4.tif", compression="group4")
    done("g4.tif", "--kernel", "gauss")
    np.testing.assert_array_equal(tifffile.imread("g4.gauss.tif"), grey)
    white = samples(rng, (4, 5))
    tifffile.imwrite("white.tif", white, photometric="miniswhite")
    assert "0 is white" in done("white.tif", "--kernel", "box", "--size", "1")
    with tifffile.TiffFile("white.box.tif") as tiff:
        assert tiff.pages[0].photometric.name == "MINISWHITE"
        np.testing.assert_array_equal(tiff.asarray(), white)
    done("white.tif", "--kernel", "box", "--size", "1", "--out", "white.png")
    np.testing.assert_array_equal(np.asarray(opened("white.png")), 255 - white)
    indexed = Image.fromarray(samples(rng, (40, 50, 3))).quantize(16)
    indexed.save("indexed.tif")
    assert "palette converted to 8-bit RGB" in done("indexed.tif", "--kernel", "gauss")
    colours = filters.correlate(np.asarray(indexed.convert("RGB")), GAUSS)
    np.testing.assert_array_equal(tifffile.imread("indexed.gauss.tif"), colours)
    pages = samples(rng, (4, 40, 50))
    first, *rest = map(Image.fromarray, pages)
    first.save("lzw.tif", save_all=True, append_images=rest, compression="tiff_lzw")
    done("lzw.tif", "--kernel", "gauss")
    expected = filters.correlate(pages, GAUSS, axes=(1, 2))
    np.testing.assert_array_equal(tifffile.imread("lzw.gauss.tif"), expected)


def test_pages_of_several_sizes_are_refused(run, rng, tifffile):
    with tifffile.TiffWriter("a.tif") as writer:
        writer.write(samples(rng, (20, 30)))
        writer.write(samples(rng, (10, 30)))
    code, out, err = run("a.tif", "--kernel", "gauss")
    assert (code, out) == (2, "")
    assert re.search(r"a\.tif.*one size.*got 2", err)


# Arrays


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", ">f4"]
)
def test_arrays_of_any_type(done, rng, dtype):
    values = (rng.standard_normal((12, 13, 5)) * 50).astype(dtype)
    np.save("a.npy", values)
    kind = np.dtype(dtype)
    wide = kind == np.float64 or (kind.kind in "iu" and kind.itemsize > 2)
    expected = np.float16 if kind == np.float16 else np.float64 if wide else np.float32
    line = done("a.npy", "--kernel", "gauss")
    assert line.startswith("a.npy: 12x13x5, ")
    found = np.load("a.gauss.npy")
    assert found.dtype == expected
    work = values.astype(expected)
    np.testing.assert_array_equal(found, filters.correlate(work, GAUSS))


def test_axes_and_origin(done, rng):
    values = samples(rng, (6, 20, 21), np.float32)
    np.save("a.npy", values)
    words = ("a.npy", "--kernel", "gauss", "--axes", "-2,2", "--origin", "1,-2")
    assert "along axes 1,2" in done(*words)
    expected = filters.correlate(values, GAUSS, axes=(1, 2), origin=(1, -2))
    np.testing.assert_array_equal(np.load("a.gauss.npy"), expected)
    done(*words, "--convolve")
    expected = filters.convolve(values, GAUSS, axes=(1, 2), origin=(1, -2))
    np.testing.assert_array_equal(np.load("a.gauss.npy"), expected)


# Sample types of the output


def test_sobel_keeps_its_sign(done, rng, tifffile):
    values = samples(rng, (40, 50))
    Image.fromarray(values).save("a.png")
    edges = filters.correlate(values.astype(np.float32), filters.sobel())
    for dtype in ("float32", "int16", "float64"):
        line = done("a.png", "--kernel", "sobel", "--out", "a.tif", "--output-dtype", dtype)
        assert f"uint8 -> a.tif, {dtype}" in line
        found = tifffile.imread("a.tif")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, edges)  # integers, exact in every type
    tifffile.imwrite("b.tif", values)
    assert "uint8 -> b.sobel.tif, float32" in done("b.tif", "--kernel", "sobel")
    np.testing.assert_array_equal(tifffile.imread("b.sobel.tif"), edges)
    done("b.tif", "--kernel", "sobel", "--output-dtype", "uint8")
    np.testing.assert_array_equal(tifffile.imread("b.sobel.tif"), np.clip(edges, 0, 255))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pictures_of_edges_are_centred(done, rng, dtype):
    values = samples(rng, (40, 50), dtype)
    write_png16("a.png", values) if dtype == "uint16" else Image.fromarray(values).save("a.png")
    edges = filters.correlate(values.astype(np.float64), filters.sobel())
    peak, top = np.abs(edges).max(), np.iinfo(dtype).max
    line = done("a.png", "--kernel", "sobel")
    assert f"{-peak:.6g} to {peak:.6g} written as 0 to {top}" in line
    found = np.asarray(opened("a.sobel.png")).astype(float)
    assert np.abs(found - (edges + peak) * (top / (2 * peak))).max() <= 0.5 + 1e-6 * top
    done("a.png", "--kernel", "sobel", "--output-dtype", dtype)
    found = np.asarray(opened("a.sobel.png"))
    np.testing.assert_array_equal(found, np.clip(edges, 0, top))


def test_values_are_scaled_into_formats_that_cannot_hold_them(done, rng, tifffile):
    values = samples(rng, (40, 50), np.float32)
    tifffile.imwrite("a.tif", values)
    low, high = values.min(), values.max()
    words = ("--kernel", "box", "--size", "1", "--out", "a.png")
    assert f"{low:.6g} to {high:.6g} written as 0 to 255" in done("a.tif", *words)
    found = np.asarray(opened("a.png")).astype(float)
    off = np.abs(found - (values.astype(float) - low) * 255 / (high - float(low)))
    assert off.max() <= 0.5 + 1e-4  # float32 range and double scale
    deep = samples(rng, (40, 50, 4), np.uint16)
    write_png16("b.png", deep)
    assert "0 to 65535 written as 0 to 255" in done("b.png", *words[:4], "--out", "b.webp")
    np.testing.assert_array_equal(np.asarray(opened("b.webp"))[..., 3], np.rint(deep[..., 3] / 257))
    assert "written as" not in done("b.png", *words[:4], "--out", "b.tif")
    np.testing.assert_array_equal(tifffile.imread("b.tif"), deep)


def test_json_holds_what_was_done(run, rng):
    Image.fromarray(samples(rng, (40, 50, 4))).save("a.png")
    code, out, _ = run("a.png", "--kernel", "gauss", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["shape"] == [40, 50, 4]
    assert record["axes"] == [0, 1]
    assert (record["dtype"], record["output_dtype"]) == ("uint8", "uint8")
    assert record["notes"] == ["alpha kept"]


@pytest.mark.parametrize(
    ("words", "is_resampled"),
    [
        ("--method multirate", True),
        ("--tolerance 0.001", True),
        ("--tolerance 0.001 --convolve --origin 2,-3", True),
        ("", False),
        ("--tolerance 0.001 --method separable", False),
    ],
)
def test_resampled_gaussians_are_named(run, done, rng, words, is_resampled):
    values = samples(rng, (300, 310))
    Image.fromarray(values).save("a.png")
    command = ["a.png", "--kernel", "gauss", "--sigma", "20", *words.split()]
    assert ("multirate, kernel error 0.00025" in done(*command)) is is_resampled
    _, out, _ = run(*command, "--json")
    record = json.loads(out)
    assert (record["method"] == "multirate") is is_resampled
    assert (record["error"] > 1e-4) is is_resampled
    shift = (2, -3) if "--origin" in words else 0
    method = "multirate" if is_resampled else "separable"
    expected = filters.convolve(values, filters.gauss(20.0), method=method, origin=shift)
    np.testing.assert_array_equal(np.asarray(opened("a.gauss.png")), expected)


def test_boxes_are_said_to_be_sums_of_windows(done, rng):
    values = samples(rng, (100, 120))
    Image.fromarray(values).save("a.png")
    assert "box 31x31, sums of windows" in done("a.png", "--kernel", "box", "--size", "31")
    expected = filters.correlate(values, filters.box(31))
    np.testing.assert_array_equal(np.asarray(opened("a.box.png")), expected)
    assert "box 31x31, direct" in done(
        "a.png", "--kernel", "box", "--size", "31", "--method", "direct"
    )


def test_the_first_line_tells_the_shift(done, rng):
    Image.fromarray(samples(rng, (40, 50))).save("a.png")
    assert "gauss 17x17, origin 0,-1, " in done("a.png", "--kernel", "gauss", "--origin", "0,-1")
    assert "origin" not in done("a.png", "--kernel", "gauss", "--origin", "0,0")


# Mistakes, damage and failing writes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.png --kernel gauss --axes 0", "--axes must be 2, one per axis of the kernel, got '0'"),
        ("a.png --kernel gauss --axes 0,0", "--axes must be different and between -2 and 1"),
        ("a.png --kernel gauss --axes 0,2", "--axes must be different and between -2 and 1"),
        ("a.png --kernel gauss --axes y,x", "--axes must be.*'y,x'"),
        ("a.png --kernel gauss --origin 99", "origin must be between -8 and 8"),
        ("a.png --kernel gaussian", "--kernel must be one of.*'gaussian': did you mean gauss"),
        ("a.png --kernel sobl", "--kernel must be one of.*'sobl': did you mean sobel"),
        ("a.png --kernel disk --method multirate", "method must not be multirate for this kernel"),
        ("a.png --kernel gauss --sigma 8 --method multirate --tolerance 1e-6", "tolerance must be"),
        ("a.png --kernel gauss --ndim 3", "--kernel must have at most the 2 axes.*got 3"),
        ("a.png --kernel gauss --ndim 1", "--axes must be given.*1 axes.*Y,X"),
        ("a.png --kernel gauss --output-dtype float32", "--output-dtype.*uint8, uint16 for .png"),
        ("a.png --kernel gauss --output-dtype rgb --out a.npy", "--output-dtype.*float64.*'rgb'"),
        (
            "a.png --kernel gauss --output-dtype uint16 --out a.jpg",
            "--output-dtype.*uint8 for .jpg",
        ),
        ("a.png --kernel gauss --out a.png --plot a.png", "--out: a.png is also another file"),
        ("a.png --kernel gauss --out .", r"--out"),
        ("v.npy --kernel gauss --out a.png", r"--out: a\.png.*\.tif or \.npy.*\(4, 5, 6\)"),
        ("empty.npy --kernel gauss", r"empty\.npy: must have at least one sample.*\(0, 5\)"),
        ("line.npy --kernel gauss --ndim 1 --out a.tif", r"--out: a\.tif.*\.npy"),
        ("rgba.png --kernel gauss --out a.jpg", r"--out: a\.jpg: cannot be written.*RGBA"),
    ],
)
def test_mistakes_get_one_sentence(run, rng, words, message):
    Image.fromarray(samples(rng, (40, 50))).save("a.png")
    Image.fromarray(samples(rng, (40, 50, 4))).save("rgba.png")
    np.save("v.npy", np.zeros((4, 5, 6)))
    np.save("line.npy", np.zeros(30))
    np.save("empty.npy", np.zeros((0, 5)))
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.fixture
def stream(tmp_path):
    """Return what C libraries have printed to the standard error stream."""
    path = tmp_path / "stderr.txt"
    saved = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    yield path.read_text
    os.dup2(saved, 2)
    os.close(saved)


@pytest.mark.parametrize("compression", ["tiff_lzw", "group3", "group4", "jpeg", "packbits"])
def test_damage_that_libtiff_prints_gets_one_sentence(done, run, rng, stream, compression):
    values = samples(rng, (200, 300))
    image = Image.fromarray(values)
    if compression.startswith("group"):
        image = image.convert("1")
    image.save("a.tif", compression=compression)
    done("a.tif", "--kernel", "gauss")
    with open("a.tif", "rb") as file:
        data = bytearray(file.read())
    damages = 0
    for start in range(200, len(data) - 1000, len(data) // 8):
        broken = data.copy()
        for i in range(start, start + 60):
            broken[i] ^= 0x5A
        with open("b.tif", "wb") as file:
            file.write(broken)
        code, out, err = run("b.tif", "--kernel", "gauss")
        assert code in (0, 2)
        if code:
            damages += 1
            assert out == ""
            assert err.count("\n") == 1
            assert "b.tif: damaged, or not a readable picture: " in err
        assert stream() == ""
    assert damages or compression not in ("tiff_lzw", "group4")  # others may decode it


@pytest.mark.parametrize("kind", ["png", "png16", "jpg", "tif", "stack.tif", "zip.tif", "npy"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.9])
def test_truncated_files_get_one_sentence(run, rng, kind, kept, tifffile, tmp_path):
    name, values = f"a.{kind}", samples(rng, (40, 50))
    if kind.startswith("png"):
        name = "a.png"
        write = write_png16 if kind == "png16" else lambda n, v: Image.fromarray(v[..., 0]).save(n)
        write(name, samples(rng, (40, 50, 3), np.uint16 if kind == "png16" else np.uint8))
    elif kind == "npy":
        np.save(name, values)
    elif kind == "jpg":
        Image.fromarray(values).save(name)
    else:
        stack = samples(rng, (20, 40, 50), np.uint16)
        options = {"compression": "zlib"} if "zip" in kind else {"imagej": "stack" in kind}
        tifffile.imwrite(name, stack, photometric="minisblack", **options)
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    code, out, err = run(name, "--kernel", "gauss")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert name in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.npy"])
def test_flipped_bytes_give_a_result_or_one_sentence(run, rng, tifffile, tmp_path, name):
    values = samples(rng, (8, 9))
    if name == "a.tif":
        tifffile.imwrite(name, values)
    elif name == "a.npy":
        np.save(name, values)
    else:
        Image.fromarray(values).save(name)
    path = tmp_path / name
    data = path.read_bytes()
    refused = 0
    for position in range(0, min(len(data), 400), 5):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        code, _, err = run(name, "--kernel", "box", "--out", "out.npy")
        lines = [x for x in err.splitlines() if not x.startswith("lowrank: warning: ")]
        assert code == (2 if lines else 0)
        assert len(lines) <= 1
        assert all(name in x for x in lines), lines
        refused += bool(lines)
    assert refused


@pytest.mark.parametrize("name", ["out.png", "out16.png", "out.jpg", "out.tif", "out.npy"])
def test_a_full_disk_leaves_the_old_file(run, rng, tifffile, tmp_path, name):
    dtype = np.uint16 if "16" in name else np.uint8
    write_png16("a.png", samples(rng, (200, 300), np.uint16))
    if dtype == np.uint8:
        Image.fromarray(samples(rng, (200, 300))).save("a.png")
    out = tmp_path / name
    out.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # bytes of any file
    try:
        code, _, err = run("a.png", "--kernel", "gauss", "--out", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(f"--out: {re.escape(name)}: cannot be written: ", err)
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written(run, rng):
    Image.fromarray(samples(rng, (8, 9))).save("a.png")
    code, out, err = run("a.png", "--kernel", "box", "--out", "/proc/a.png")
    assert (code, out) == (2, "")
    assert re.fullmatch("lowrank: --out: /proc/a.png: cannot be written: .*\n", err)


def test_the_input_may_be_the_output(done, rng):
    values = samples(rng, (40, 50))
    Image.fromarray(values).save("a.png")
    done("a.png", "--kernel", "gauss", "--out", "a.png")
    np.testing.assert_array_equal(np.asarray(opened("a.png")), filters.correlate(values, GAUSS))


def test_missing_tifffile_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    code, _, err = run("a.tif", "--kernel", "gauss")
    assert code == 2
    assert re.search("TIFF files need tifffile: pip install", err)
