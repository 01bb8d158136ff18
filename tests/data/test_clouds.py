"""Clouds of points as their files hold them, and what is refused."""

import numpy as np
import pytest

from provenn.core.errors import UserError
from provenn.data.clouds import cloud_of, read_cloud

plyfile, laspy, pypcd4 = (pytest.importorskip(name) for name in ("plyfile", "laspy", "pypcd4"))

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(0, 5, (40, 3)).astype(np.float32)
COLOURS = RNG.integers(0, 256, (40, 3)).astype(np.uint8)
NORMALS = RNG.normal(size=(40, 3)).astype(np.float32)


def write_ply(file, points=POINTS, colours=COLOURS, normals=None, text=False):
    columns = [(n, points[:, i]) for i, n in enumerate("xyz")]
    if colours is not None:
        columns += [(n, colours[:, i]) for i, n in enumerate(("red", "green", "blue"))]
    if normals is not None:
        columns += [(n, normals[:, i]) for i, n in enumerate(("nx", "ny", "nz"))]
    rows = np.empty(len(points), dtype=[(name, values.dtype) for name, values in columns])
    for name, values in columns:
        rows[name] = values
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], text=text).write(str(file))
    return file


def write_las(file, colours=COLOURS, deep=False, form=3):
    header = laspy.LasHeader(point_format=form, version="1.2")
    header.scales, header.offsets = [0.001] * 3, [500_000.0, 5_000_000.0, 0.0]
    las = laspy.LasData(header)
    las.x, las.y, las.z = (POINTS[:, i].astype(float) + header.offsets[i] for i in range(3))
    if colours is not None:
        for i, name in enumerate(("red", "green", "blue")):
            setattr(las, name, colours[:, i].astype(np.uint16) * (257 if deep else 1))
    las.write(str(file))
    return file


@pytest.mark.parametrize("text", [False, True])
def test_ply_with_colours_and_normals(tmp_path, text):
    cloud = read_cloud(write_ply(tmp_path / "a.ply", normals=NORMALS, text=text))
    assert np.allclose(cloud.points + cloud.origin, POINTS, atol=1e-5)
    assert np.allclose(cloud.colours * 255, COLOURS, atol=1e-3)
    assert np.allclose(cloud.normals, NORMALS / np.linalg.norm(NORMALS, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_las_far_from_its_origin_with_colours_of_8_or_16_bits(tmp_path, deep):
    """Of coordinates around 5,000,000 float32 keeps half a metre."""
    cloud = read_cloud(write_las(tmp_path / "a.las", deep=deep))
    assert np.allclose(cloud.points - cloud.points.min(0), POINTS - POINTS.min(0), atol=2e-3)
    assert np.allclose(cloud.colours * 255, COLOURS, atol=1e-3)
    assert cloud.origin[1] > 4_999_999


def test_las_whose_fields_of_colours_are_empty_has_none(tmp_path):
    assert read_cloud(write_las(tmp_path / "a.las", colours=None)).colours is None
    assert read_cloud(write_las(tmp_path / "b.las", colours=None, form=0)).colours is None


def test_pcd_with_packed_colours(tmp_path):
    packed = pypcd4.PointCloud.encode_rgb(COLOURS)
    cloud = pypcd4.PointCloud.from_xyzrgb_points(np.column_stack([POINTS, packed]))
    cloud.save(str(tmp_path / "a.pcd"))
    read = read_cloud(tmp_path / "a.pcd")
    assert np.allclose(read.points + read.origin, POINTS, atol=1e-5)
    assert np.allclose(read.colours * 255, COLOURS, atol=1e-3)
    assert read.normals is None


def columns(points=POINTS, **more):
    return {axis: points[:, i] for i, axis in enumerate("xyz")} | more


def test_fractions_are_colours_from_0_to_1():
    shades = COLOURS / 255.0
    cloud = cloud_of(columns(**{n: shades[:, i] for i, n in enumerate("rgb")}), "a")
    assert np.allclose(cloud.colours, shades, atol=1e-6)


def test_millimetres_are_read_where_they_are_said(tmp_path):
    cloud = read_cloud(write_ply(tmp_path / "a.ply", points=POINTS * 1000), scale=0.001)
    assert np.allclose(cloud.points + cloud.origin, POINTS, atol=1e-4)
    wide = cloud_of(columns(POINTS * 1000), "a", scale=1)
    assert wide.points.max() > 1000


@pytest.mark.parametrize("scale", [1e300, 1e30, 1e-30, 1e-300, 5e-324])
def test_a_scale_that_leaves_no_cloud_in_float32_is_refused(scale):
    """Beyond, squares of distances overflow or are 0."""
    with (
        pytest.raises(UserError, match=r"metres wide, got .* with scale=.*0\.001 of millimetres"),
        np.errstate(all="raise"),
    ):
        cloud_of(columns(POINTS * 1000), "a", scale=scale)
    for known in (1e-6, 1e5):
        assert np.square(cloud_of(columns(POINTS * 1000), "a", scale=known).points.max(0)).all()
    with pytest.raises(UserError, match="its coordinates are no metres"):
        cloud_of(columns(POINTS.astype(float) * 1e-50), "a")


def with_nan():
    points = POINTS.copy()
    points[6, 1] = np.nan
    return points


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (columns(with_nan()), {}, "1 of 40 points .* first point 7"),
        (columns(POINTS[:10]), {}, "has 10 points: expected at least 16"),
        (columns(POINTS * 1000), {}, "scale=0.001"),
        (columns(POINTS * 1e37), {"scale": 1}, "numbers are damaged"),
        (columns(POINTS.astype(float) * 3e307 - 1e308), {"scale": 1}, "numbers are damaged"),
        (columns(), {"colours": True}, "has no colours"),
        (columns(POINTS * 0), {}, "lie in one place"),
        ({"x": POINTS[:, 0]}, {}, "no y, z"),
        (columns(r=-COLOURS[:, 0].astype(int), g=COLOURS[:, 1], b=COLOURS[:, 2]), {}, "negative"),
    ],
)
def test_clouds_that_are_none_are_refused_in_a_line(given, options, words):
    with pytest.raises(UserError, match=words) as caught:
        cloud_of(given, "a", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".ply", ".las", ".pcd", ".laz"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 20, b"ply\nformat ascii 1.0\nelement vertex 40\n"])
def test_files_that_are_no_clouds_are_refused_in_a_line(tmp_path, suffix, content):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_cloud(file)
    assert "\n" not in str(caught.value) and "a." in str(caught.value)


def test_files_cut_short_and_other_endings_are_refused(tmp_path):
    for write, name in ((write_ply, "a.ply"), (write_las, "a.las")):
        file = write(tmp_path / name)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"cannot be read|cut short"):
            read_cloud(file)
    with pytest.raises(UserError, match=r"ends in \.ply"):
        read_cloud(tmp_path / "a.obj")
    with pytest.raises(UserError, match="scale must be"):
        read_cloud(file, scale=0)
