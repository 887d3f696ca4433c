"""load_data: every source, the shapes and types it gives, and every way it can be refused."""

import itertools
import logging
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from onnxcompress.data import Dataset, InputSpec, Preprocess, load_data
from onnxcompress.data.files import Lazy
from onnxcompress.errors import DataError, RecipeError

GRAY = InputSpec("image", np.dtype(np.float32), ("N", 1, 8, 8))
COLOUR = InputSpec("image", np.dtype(np.float32), ("N", 3, 4, 6))
IDS = InputSpec("ids", np.dtype(np.int64), ("N", "length"))
MASK = InputSpec("mask", np.dtype(np.int64), ("N", "length"))
PAIR = InputSpec("v", np.dtype(np.float32), ("N", 2))


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def collect(data, size=4):
    """The batches of a dataset, joined: feeds by name, labels."""
    feeds, labels = zip(*data.batches(size), strict=True)
    joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    return joined, None if labels[0] is None else np.concatenate(labels)


def refused(spec, *inputs, error=DataError, **options):
    """The one-line message with which load_data, or reading all batches, refuses."""
    with pytest.raises(error) as caught:
        list(load_data(str(spec), inputs=inputs, **options).batches(2))
    message = str(caught.value)
    assert "\n" not in message
    assert "DataError" not in message  # refused once, not twice
    return message


# Arrays


@pytest.mark.parametrize("label_name", ["labels", "label", "y"])
@pytest.mark.parametrize("name", ["image", "x", "images", "anything"])
def test_npz_of_a_model_with_one_input(tmp_path, name, label_name):
    x, y = random(10, 1, 8, 8), np.arange(10, dtype=np.uint8)
    np.savez(tmp_path / "d.npz", **{name: x, label_name: y})
    data = load_data(str(tmp_path / "d.npz"), inputs=[GRAY])
    feeds, labels = collect(data)
    assert len(data) == 10
    assert [len(feed["image"]) for feed, _ in data.batches(4)] == [4, 4, 2]
    np.testing.assert_array_equal(feeds["image"], x)
    np.testing.assert_array_equal(labels, y)
    assert labels.dtype == np.int64
    assert data.samples[0]["image"].shape == (1, 8, 8)


def test_npz_prefers_the_name_of_the_input(tmp_path):
    np.savez(tmp_path / "d.npz", x=random(3, 1, 8, 8), image=random(2, 1, 8, 8))
    assert len(load_data(str(tmp_path / "d.npz"), inputs=[GRAY])) == 2


def test_npz_of_a_model_with_two_inputs_one_named_like_a_label(tmp_path):
    y = InputSpec("y", np.dtype(np.float32), ("N", 2))
    ids = np.arange(12).reshape(4, 3)
    np.savez(tmp_path / "d.npz", ids=ids, y=random(4, 2), label=np.arange(4))
    data = load_data(str(tmp_path / "d.npz"), inputs=[IDS, y])
    feeds, labels = collect(data, 3)
    np.testing.assert_array_equal(feeds["ids"], ids)
    np.testing.assert_array_equal(feeds["y"], random(4, 2))
    np.testing.assert_array_equal(labels, np.arange(4))
    np.savez(tmp_path / "d.npz", ids=ids, y=random(4, 2))
    assert load_data(str(tmp_path / "d.npz"), inputs=[IDS, y]).labels is None


@pytest.mark.parametrize(
    ("array", "spec"),
    [
        (random(3, 2, dtype=np.float64), PAIR),
        (random(3, 2, dtype=np.float16), PAIR),
        (random(3, 2).astype(">f4"), PAIR),
        (random(3, 2, dtype=np.float64), InputSpec("v", np.dtype(np.float16), ("N", 2))),
        (np.arange(6, dtype=np.int32).reshape(3, 2), IDS),
        (np.arange(6, dtype=np.int64).reshape(3, 2), InputSpec("ids", np.dtype(np.uint8), (None, 2))),
        (np.ones((3, 2), bool), MASK),
        (np.array([["a", "b"]]), InputSpec("text", np.dtype(object), ("N", 2))),
    ],
)
def test_casts_that_keep_the_values(tmp_path, array, spec):
    np.savez(tmp_path / "d.npz", x=array)
    feeds, labels = collect(load_data(str(tmp_path / "d.npz"), inputs=[spec]))
    assert feeds[spec.name].dtype == spec.dtype
    assert labels is None
    np.testing.assert_array_equal(feeds[spec.name], array.astype(spec.dtype))


@pytest.mark.parametrize(
    ("array", "spec", "parts"),
    [
        (np.zeros((3, 8, 8), np.float32), GRAY, ["'x'", "(3, 8, 8)", "(N, 1, 8, 8)", "reshape"]),
        (np.zeros((3, 1, 8, 9), np.float32), GRAY, ["(3, 1, 8, 9)", "(N, 1, 8, 8)"]),
        (np.zeros((3, 2), np.int64), PAIR, ["'x'", "int64", "expects float32", "save it as float32"]),
        (np.zeros((3, 2), np.uint8), PAIR, ["uint8", "expects float32"]),
        (np.zeros((3, 2), bool), PAIR, ["bool", "expects float32"]),
        (np.zeros((3, 1, 8, 8), np.int64), GRAY, ["int64", "or as uint8 images"]),
        (np.zeros((3, 2), np.float32), IDS, ["float32", "expects int64"]),
        (np.zeros((3, 2), np.complex64), PAIR, ["complex64", "expects float32"]),
        (np.zeros((3, 2), np.int64), InputSpec("b", np.dtype(bool), ("N", 2)), ["int64", "expects bool"]),
        (np.array([["a", "b"]]), PAIR, ["<U1", "expects float32"]),
        (np.array([[1.0, 2.0], [np.nan, 4.0]]), PAIR, ["sample 1", "1 NaN of 2"]),
        (np.array([[300, -1]]), InputSpec("i", np.dtype(np.uint8), ("N", 2)), ["-1 to 300", "0 to 255"]),
        (np.array([[1e300, 0]]), PAIR, ["1e+300", "float32 ends at 3.4e+38"]),
        (np.zeros((0, 2), np.float32), PAIR, ["no samples"]),
        (np.array([[{}, {}]]), PAIR, ["'x'", "pickled objects, which are never loaded"]),
    ],
)
def test_npz_is_refused(tmp_path, array, spec, parts):
    np.savez(tmp_path / "d.npz", x=array)
    message = refused(tmp_path / "d.npz", spec)
    assert all(part in message for part in [str(tmp_path / "d.npz"), *parts]), message


def test_infinity_is_a_value(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([[-np.inf, 0.0]]))
    assert load_data(str(tmp_path / "d.npz"), inputs=[PAIR]).samples[0]["v"][0] == -np.inf


def test_npz_members_and_labels_that_do_not_fit(tmp_path):
    file = tmp_path / "d.npz"
    np.savez(file, ids=np.zeros((2, 3), int))
    assert "no array 'mask'; it has ids" in refused(file, IDS, MASK)
    np.savez(file, a=random(2, 2), b=random(2, 2))
    assert "no array 'v'; it has a, b" in refused(file, PAIR)
    np.savez(file, ids=np.zeros((2, 3), int), mask=np.zeros((3, 3), int))
    assert "ids 2, mask 3" in refused(file, IDS, MASK)
    np.savez(file, x=random(4, 2), y=np.arange(3))
    assert "3 labels for 4 samples" in refused(file, PAIR)
    np.savez(file, x=random(4, 2), y=np.array(list("abcd")))
    assert "labels are <U1" in refused(file, PAIR)
    np.savez(file, x=random(2, 2), y=np.array([0.0, np.nan]))
    assert "labels hold NaN" in refused(file, PAIR)
    np.savez(file)
    assert "it has none" in refused(file, PAIR)


def test_labels_keep_floats_and_lose_a_trailing_axis_of_one(tmp_path):
    np.savez(tmp_path / "d.npz", x=random(4, 2), y=np.arange(4, dtype=np.uint8)[:, None])
    assert load_data(str(tmp_path / "d.npz"), inputs=[PAIR]).labels.shape == (4,)
    np.savez(tmp_path / "d.npz", x=random(4, 2), y=random(4, 3))
    np.testing.assert_array_equal(load_data(str(tmp_path / "d.npz"), inputs=[PAIR]).labels, random(4, 3))


def test_broken_files(tmp_path):
    file = tmp_path / "d.npz"
    for content in (b"", b"no zip at all", b"PK\x03\x04 cut"):
        file.write_bytes(content)
        assert str(file) in refused(file, PAIR)
    np.savez_compressed(file, x=random(100, 2))
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes(20) + whole[220:])  # inside the deflated array
    assert "'x' cannot be read" in refused(file, PAIR)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", "text")
    assert "'x' is no array" in refused(file, PAIR)
    np.save(tmp_path / "a.npy", random(3, 2))
    damaged = (tmp_path / "a.npy").read_bytes().replace(b"(3, 2)", b"(3, 2 ")
    (tmp_path / "a.npy").rename(file)
    assert "rename it to d.npy" in refused(file, PAIR)
    (tmp_path / "a.npy").write_bytes(damaged)
    assert "a.npy cannot be read" in refused(tmp_path / "a.npy", PAIR)


# Folders of .npy


def test_npy_folder_mixes_samples_and_batches_in_natural_order(tmp_path):
    x = random(5, 2)
    for name, array in {"1": x[0], "2": x[1:3], "10": x[3], "11": x[4:]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "labels.npy", np.arange(5))
    (tmp_path / ".hidden.npy").write_bytes(b"")
    feeds, labels = collect(load_data(str(tmp_path), inputs=[PAIR]), 2)
    np.testing.assert_array_equal(feeds["v"], x)
    np.testing.assert_array_equal(labels, np.arange(5))


def test_npy_files_of_several_inputs(tmp_path):
    tokens = InputSpec("a/ids:0", np.dtype(np.int64), ("N", "length"))
    ids = np.arange(12).reshape(4, 3)
    (tmp_path / "mask").mkdir()
    for index in range(4):
        np.save(tmp_path / "mask" / f"{index}.npy", ids[index] % 2)
    np.save(tmp_path / "a_ids_0.npy", ids)
    feeds, _ = collect(load_data(str(tmp_path), inputs=[tokens, MASK]))
    np.testing.assert_array_equal(feeds["a/ids:0"], ids)
    np.testing.assert_array_equal(feeds["mask"], ids % 2)
    np.save(tmp_path / "mask" / "4.npy", ids[0])
    assert "a/ids:0 4, mask 5" in refused(tmp_path, tokens, MASK)
    assert "no extra.npy and no .npy in a folder extra" in refused(
        tmp_path, tokens, MASK, InputSpec("extra", np.dtype(np.float32), ("N",))
    )


def test_single_npy(tmp_path):
    np.save(tmp_path / "x.npy", random(3, 2, dtype=np.float64))
    feeds, _ = collect(load_data(str(tmp_path / "x.npy"), inputs=[PAIR]))
    np.testing.assert_array_equal(feeds["v"], random(3, 2, dtype=np.float64).astype(np.float32))
    assert "the model has 2 (ids, mask)" in refused(tmp_path / "x.npy", IDS, MASK)


def test_npz_values_are_read_at_once(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([[0.0, 1.0], [np.nan, 0.0]]))
    with pytest.raises(DataError, match="sample 1, 'v' holds 1 NaN of 2 values"):
        load_data(str(tmp_path / "d.npz"), inputs=[PAIR])


def test_npy_values_are_read_when_asked_for(tmp_path):
    np.save(tmp_path / "0.npy", random(3, 2))
    np.save(tmp_path / "1.npy", np.array([0.0, np.nan]))
    data = load_data(str(tmp_path), inputs=[PAIR])
    assert data.samples[2]["v"].shape == (2,)
    with pytest.raises(DataError, match=r"1\.npy.*1 NaN"):
        data.samples[3]
    np.save(tmp_path / "1.npy", random(3))
    assert "1.npy has shape (3), input 'v' expects a sample (2)" in refused(tmp_path, PAIR)
    np.save(tmp_path / "1.npy", np.arange(2))
    assert "1.npy is int64" in refused(tmp_path, PAIR)
    np.save(tmp_path / "1.npy", np.array([{}, {}]))
    assert "never loaded" in refused(tmp_path, PAIR)


def test_many_npy_files_stay_closed(tmp_path):
    resource = pytest.importorskip("resource")
    for index in range(80):
        np.save(tmp_path / f"{index}.npy", random(2, seed=index))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        kept = list(load_data(str(tmp_path), inputs=[PAIR]).samples)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(kept) == 80


def test_lengths_that_differ_end_a_batch(tmp_path):
    for index, length in enumerate([3, 3, 5, 5, 5, 3]):
        np.save(tmp_path / f"{index}.npy", np.full(length, index))
    np.save(tmp_path / "labels.npy", np.arange(6))
    data = load_data(str(tmp_path), inputs=[IDS])
    assert [feed["ids"].shape for feed, _ in data.batches(2)] == [(2, 3), (2, 5), (1, 5), (1, 3)]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in data.batches(2)]), np.arange(6))


def test_folder_that_holds_nothing_or_too_much(tmp_path):
    assert "holds no .npy file and no image" in refused(tmp_path, GRAY)
    (tmp_path / "notes.txt").write_text("")
    np.save(tmp_path / "labels.npy", np.arange(3))
    assert "holds no .npy file and no image" in refused(tmp_path, GRAY)
    (tmp_path / "a.png").touch()
    np.save(tmp_path / "x.npy", random(3, 2))
    assert "both .npy files and images" in refused(tmp_path, GRAY)


# The batch axis


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 7), (3, [3, 3])])
def test_a_fixed_batch_is_kept(tmp_path, caplog, batch, sizes):
    np.savez(tmp_path / "d.npz", x=random(7, 2), y=np.arange(7))
    with caplog.at_level(logging.WARNING):
        data = load_data(str(tmp_path / "d.npz"), inputs=[InputSpec("v", np.dtype(np.float32), (batch, 2))])
    assert [len(feed["v"]) for feed, _ in data.batches(32)] == sizes
    assert len(data) == sum(sizes)
    assert [record.getMessage() for record in caplog.records] == (
        [f"{tmp_path / 'd.npz'}: 1 of 7 samples fill no batch of 3"] if batch == 3 else []
    )


def test_a_fixed_batch_that_cannot_be_filled(tmp_path):
    np.savez(tmp_path / "d.npz", x=random(7, 2))
    fixed = InputSpec("v", np.dtype(np.float32), (8, 2))
    assert "7 samples, the model's batch is fixed at 8" in refused(tmp_path / "d.npz", fixed)
    for index, length in enumerate([3, 3, 3, 5]):
        np.save(tmp_path / f"{index}.npy", np.zeros(length, np.int64))
    (tmp_path / "d.npz").unlink()
    assert "samples 2 to 2" in refused(tmp_path, InputSpec("ids", np.dtype(np.int64), (2, "length")))


@pytest.mark.parametrize("open_dim", ["batch", None, 0, -1])
def test_open_dimensions(tmp_path, open_dim):
    np.savez(tmp_path / "d.npz", x=random(3, 2))
    data = load_data(str(tmp_path / "d.npz"), inputs=[InputSpec("v", np.float32, (open_dim, 2))])
    assert data.batch is None
    assert [len(feed["v"]) for feed, _ in data.batches(2)] == [2, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [(("N", 4), ()), (("N", 4), (2, "N", 3)), ((1, 4), (2, 1, 3)), ((16,), (4,))],
)
def test_inputs_without_a_common_batch_axis_come_as_complete_feeds(tmp_path, first, second):
    inputs = [InputSpec("a", np.dtype(np.float32), first), InputSpec("b", np.dtype(np.float32), second)]
    shapes = [[dim if isinstance(dim, int) else 1 for dim in shape] for shape in (first, second)]
    np.savez(tmp_path / "d.npz", a=random(3, *shapes[0]), b=random(3, *shapes[1]), y=np.arange(3))
    feeds = list(load_data(str(tmp_path / "d.npz"), inputs=inputs).batches(8))
    assert [(list(f["a"].shape), list(f["b"].shape), y.tolist()) for f, y in feeds] == [
        (*shapes, [k]) for k in range(3)
    ]
    np.testing.assert_array_equal(feeds[1][0]["a"], random(3, *shapes[0])[1])


# Choice of samples


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(200, dtype=np.float32).reshape(100, 2), y=np.arange(100))
    draws = [load_data(str(tmp_path / "d.npz"), inputs=[PAIR], limit=20, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (draw.labels.tolist() for draw in draws)
    assert first == again != other
    assert first == sorted(first)
    assert len(set(first)) == 20
    assert first != list(range(20))
    np.testing.assert_array_equal([s["v"][0] for s in draws[0].samples], 2 * draws[0].labels)
    assert len(load_data(str(tmp_path / "d.npz"), inputs=[PAIR], limit=1000)) == 100
    assert "at least 1" in refused(tmp_path / "d.npz", PAIR, limit=0, error=RecipeError)


# Images

SIDE = {"left": (255, 0, 0), "right": (0, 0, 255)}


def save_image(path, size=(12, 8), mode="RGB"):
    """An image (width, height) with a red left half and a blue right half."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = SIDE["left"], SIDE["right"]
    path.parent.mkdir(exist_ok=True)
    image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_image_values(tmp_path, mode):
    save_image(tmp_path / "a.png", mode=mode)
    sample = load_data(str(tmp_path), inputs=[COLOUR]).samples[0]["image"]
    assert sample.shape == (3, 4, 6)
    assert sample.dtype == np.float32
    np.testing.assert_array_equal(sample[:, 0, 0], [1, 0, 0])
    np.testing.assert_array_equal(sample[:, -1, -1], [0, 0, 1])


def test_image_settings(tmp_path):
    save_image(tmp_path / "a.png")
    plain = load_data(str(tmp_path), inputs=[COLOUR]).samples[0]["image"]

    def load(settings, *shape, dtype=np.float32):
        return load_data(str(tmp_path), inputs=[InputSpec("i", dtype, ("N", *shape))], preprocess=settings).samples[0][
            "i"
        ]

    np.testing.assert_array_equal(load("", 4, 6, 3), plain.transpose(1, 2, 0))
    np.testing.assert_array_equal(load("layout=nhwc,size=4x6", None, None, "c"), plain.transpose(1, 2, 0))
    np.testing.assert_array_equal(load("channels=bgr", 3, 4, 6), plain[::-1])
    np.testing.assert_array_equal(load("scale=1", 3, 4, 6), plain * 255)
    np.testing.assert_array_equal(load("", 3, 4, 6, dtype=np.uint8), plain * 255)
    mean, std = np.float32([0.5, 0.25, 0.125]), np.float32([0.5, 1, 2])
    np.testing.assert_array_equal(
        load("mean=0.5:0.25:0.125,std=0.5:1:2", 3, 4, 6), (plain - mean[:, None, None]) / std[:, None, None]
    )
    np.testing.assert_array_equal(
        load("mean=0.5:0.25:0.125,std=0.5:1:2", 4, 6, 3), (plain.transpose(1, 2, 0) - mean) / std
    )
    np.testing.assert_array_equal(load("channels=gray", 1, 4, 6)[0, 0, [0, -1]] * 255, [76, 29])  # ITU-R 601 luma
    np.testing.assert_array_equal(load("", 1, 4, 6), load("channels=gray", 1, 4, 6))


def test_center_crop_keeps_proportions_and_stretch_keeps_all(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 255
    image.fromarray(pixels).save(tmp_path / "a.png")
    spec = InputSpec("image", np.dtype(np.float32), ("N", 1, 8, 8))
    assert load_data(str(tmp_path), inputs=[spec]).samples[0]["image"].min() == 1
    stretched = load_data(str(tmp_path), inputs=[spec], preprocess="crop=stretch").samples[0]["image"]
    assert stretched[0, 0, 0] == 0
    assert stretched[0, 0, 4] == 1


def test_image_labels(tmp_path):
    for name in ("dog/1.png", "dog/2.png", "cat/1.JPG", "ant/1.png"):
        save_image(tmp_path / name)
    (tmp_path / "bee").mkdir()  # a class without a sample keeps its number
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").touch()
    assert load_data(str(tmp_path), inputs=[COLOUR]).labels.tolist() == [0, 2, 3, 3]
    np.save(tmp_path / "labels.npy", np.arange(4))
    assert load_data(str(tmp_path), inputs=[COLOUR]).labels.tolist() == [0, 1, 2, 3]
    save_image(tmp_path / "z.png")
    assert "beside sub-folders" in refused(tmp_path, COLOUR)


def test_image_labels_that_are_numbers(tmp_path):
    for name in ("2", "10", "007"):
        save_image(tmp_path / name / "a.png")
    assert load_data(str(tmp_path), inputs=[COLOUR]).labels.tolist() == [2, 7, 10]


def test_images_without_sub_folders_have_no_labels_unless_stored(tmp_path):
    save_image(tmp_path / "2.png")
    save_image(tmp_path / "10.png")
    assert load_data(str(tmp_path), inputs=[COLOUR]).labels is None
    np.save(tmp_path / "labels.npy", np.array([2, 10]))
    assert load_data(str(tmp_path), inputs=[COLOUR]).labels.tolist() == [2, 10]


def test_images_are_decoded_when_asked_for(tmp_path):
    save_image(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    (tmp_path / "3.jpg").write_text("no image")
    data = load_data(str(tmp_path), inputs=[COLOUR])
    assert data.samples[0]["image"].shape == (3, 4, 6)
    for index, name in ((1, "2.png"), (2, "3.jpg")):
        with pytest.raises(DataError, match=f"{name} cannot be decoded"):
            data.samples[index]


def test_sixteen_bit_images_are_not_clipped(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "a.png")
    assert "8 bits are expected" in refused(tmp_path, GRAY)


@pytest.mark.parametrize(
    ("settings", "shape", "parts"),
    [
        ("size", ("N", 3, 4, 6), ["'' is no value for size"]),
        ("size=big", ("N", 3, 4, 6), ["'big' is no value for size"]),
        ("size=0", ("N", 3, 4, 6), ["at least 1"]),
        ("size=5", ("N", 3, 4, 6), ["does not take size=5x5"]),
        ("colour=rgb", ("N", 3, 4, 6), ["unknown setting 'colour'", "size, layout, mean, std, scale, crop, channels"]),
        ("scale=1,scale=2", ("N", 3, 4, 6), ["scale is given twice"]),
        ("scale=0", ("N", 3, 4, 6), ["scale=0", "greater than 0"]),
        ("std=0", ("N", 3, 4, 6), ["std greater than 0"]),
        ("mean=nan", ("N", 3, 4, 6), ["mean must be finite"]),
        ("mean=1:2", ("N", 3, 4, 6), ["mean has 2 values", "1 or 3"]),
        ("crop=top", ("N", 3, 4, 6), ["crop=top", "center, stretch"]),
        ("layout=chw", ("N", 3, 4, 6), ["nchw, nhwc"]),
        ("channels=gray", ("N", 3, 4, 6), ["3 channels", "channels=gray gives 1"]),
        ("layout=nhwc", ("N", 3, 4, 6), ["6 channels in layout nhwc"]),
        ("", ("N", 4, 4, 6), ["4 channels"]),
        ("", ("N", 3, "h", "w"), ["leaves the image size open", "size=224"]),
        ("", ("N", 64), ["takes no images"]),
    ],
)
def test_preprocess_is_refused(tmp_path, settings, shape, parts):
    save_image(tmp_path / "a.png")
    spec = InputSpec("image", np.dtype(np.float32), shape)
    message = refused(tmp_path, spec, preprocess=settings, error=RecipeError)
    assert all(part in message for part in parts), message


def test_images_feed_one_input(tmp_path):
    save_image(tmp_path / "a.png")
    assert "the model has 2 (image, ids)" in refused(tmp_path, COLOUR, IDS)


def test_pixels_go_plain_into_an_integer_input(tmp_path):
    save_image(tmp_path / "a.png")
    spec = InputSpec("image", np.dtype(np.uint8), ("N", 3, 4, 6))
    assert "leave mean and std out" in refused(tmp_path, spec, preprocess="mean=0.5", error=RecipeError)


def test_uint8_arrays_are_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), np.uint8)
    np.savez(tmp_path / "d.npz", x=pixels)
    feeds, _ = collect(load_data(str(tmp_path / "d.npz"), inputs=[COLOUR], preprocess="mean=0.5,std=0.25"))
    expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    np.testing.assert_array_equal(feeds["image"], expected)
    np.savez(tmp_path / "d.npz", x=pixels.astype(np.float32))
    message = refused(tmp_path / "d.npz", COLOUR, preprocess=Preprocess(mean=(0.5,)), error=RecipeError)
    assert "float32" in message
    assert "leave it out" in message


def test_missing_packages_are_named(tmp_path, monkeypatch):
    save_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install pillow" in refused(tmp_path, COLOUR)
    assert "pip install scikit-learn" in refused("sklearn:digits", GRAY)


def test_pillow_and_sklearn_are_imported_where_they_are_used():
    code = "import sys, onnxcompress.data; print([m for m in ('PIL', 'sklearn', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# scikit-learn's digits


@pytest.mark.parametrize("shape", [("N", 1, 8, 8), ("N", 8, 8, 1), ("N", 64), (None, 8, 8), ("N", 1, "h", "w")])
def test_digits_take_the_shape_of_the_input(shape):
    pytest.importorskip("sklearn")
    spec = InputSpec("image", np.dtype(np.float32), shape)
    sample = load_data("sklearn:digits", inputs=[spec], limit=5).samples[0]["image"]
    assert all(dim == have for dim, have in zip(shape[1:], sample.shape, strict=True) if isinstance(dim, int))
    same = load_data("sklearn:digits", inputs=[GRAY], limit=5).samples[0]["image"]
    np.testing.assert_array_equal(sample.reshape(8, 8), same[0])


def test_digits_parts_are_disjoint_and_complete():
    datasets = pytest.importorskip("sklearn.datasets")
    parts = [load_data(f"sklearn:digits{part}", inputs=[GRAY]) for part in ("", ":train", ":all")]
    held_out, train, everything = ({tuple(s["image"].ravel()) for s in part.samples} for part in parts)
    assert [len(part) for part in parts] == [599, 1198, 1797]
    assert held_out | train == everything
    assert not held_out & train
    raw = datasets.load_digits()
    np.testing.assert_array_equal([s["image"][0] for s in parts[2].samples], np.float32(raw.images / 16))
    np.testing.assert_array_equal(parts[2].labels, raw.target)
    assert np.bincount(parts[0].labels, minlength=10).min() >= 45  # measured 48: every class is held out


def test_digits_are_refused():
    assert "sklearn:digits:train" in refused("sklearn:iris", GRAY)
    assert "no such data set" in refused("sklearn:digits:test", GRAY)
    pytest.importorskip("sklearn")
    assert "8x8 in one channel" in refused("sklearn:digits", COLOUR)
    assert "expects int64" in refused("sklearn:digits", InputSpec("i", np.dtype(np.int64), ("N", 64)))
    assert "leave it out" in refused("sklearn:digits", GRAY, preprocess="scale=16", error=RecipeError)


# A Python function

MODULE = """
import itertools
import numpy as np
from onnxcompress.data import Dataset

x, y = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6)

def stack(): return x
def pair(): return x, y
def mapping(): return {"v": x, "labels": y}
def samples(): return list(x)
def sample_pairs(): return zip(x, y)
def batches(): return [[x[:4], y[:4]], [x[4:], y[4:]]]
def dicts(): return ({"v": row, "y": label} for row, label in zip(x, y))
def lists(): return [row.tolist() for row in x]
def dataset(): return Dataset([{"v": row.astype(float)} for row in x], y)
def endless(): return ((row, label) for row, label in itertools.cycle(zip(x, y)))

def some_labels(): return [(x[0], 0), x[1]]
def wrong_shape(): return [x[0], x[1][:1]]
def wrong_dataset(): return Dataset([{"w": x[0]}])
def short_labels(): return x, y[:3]
def short_dataset():
    class Samples(list):
        def __len__(self): return 9
    return Dataset(Samples({"v": row} for row in x))
def empty(): return []
def nothing(): pass
def fails(): raise KeyError("no such\\nfile")
constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "data_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("x = (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "data_of_mine", raising=False)
    yield "data_of_mine"
    sys.modules.pop("data_of_mine", None)


@pytest.mark.parametrize(
    "function",
    ["stack", "pair", "mapping", "samples", "sample_pairs", "batches", "dicts", "lists", "dataset"],
)
def test_function(module, function):
    before = list(sys.path)
    data = load_data(f"{module}:{function}", inputs=[PAIR])
    feeds, labels = collect(data)
    np.testing.assert_array_equal(feeds["v"], np.arange(12).reshape(6, 2))
    assert feeds["v"].dtype == np.float32
    assert sys.path == before
    if function in ("stack", "samples", "lists"):
        assert labels is None
    else:
        np.testing.assert_array_equal(labels, np.arange(6))


def test_function_with_an_input_named_like_a_label(module):
    y = InputSpec("y", np.dtype(np.int64), ("N",))
    data = load_data(f"{module}:dicts", inputs=[PAIR, y])
    assert data.labels is None
    assert [sample["y"].tolist() for sample in data.samples] == [0, 1, 2, 3, 4, 5]


def test_function_without_end_is_read_up_to_the_limit(module):
    assert load_data(f"{module}:endless", inputs=[PAIR], limit=8).labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("data_of_mine:some_labels", ["item 1", "1 labels for 2 samples"]),
        ("data_of_mine:wrong_shape", ["item 1, 'v' has shape (1)", "expects a sample (2)"]),
        ("data_of_mine:wrong_dataset", ["sample 0 has no array for input 'v'", "it has w"]),
        ("data_of_mine:short_labels", ["3 labels for 6 samples"]),
        ("data_of_mine:short_dataset", ["sample 6", "IndexError"]),
        ("data_of_mine:empty", ["holds no samples"]),
        ("data_of_mine:nothing", ["TypeError", "not iterable"]),
        ("data_of_mine:fails", ["KeyError", "no such"]),
        ("data_of_mine:constant", ["TypeError", "not callable"]),
        ("data_of_mine:absent", ["AttributeError", "absent"]),
        ("no_such_module_here:f", ["ModuleNotFoundError", "no_such_module_here"]),
        ("broken_module:f", ["SyntaxError"]),
    ],
)
def test_function_is_refused(module, spec, parts):
    message = refused(spec, PAIR)
    assert all(part in message for part in [spec, *parts]), message


# What is none of these


@pytest.mark.parametrize(
    "spec",
    [
        r"C:\x.npz",
        "C:/data/x.npz",
        "C:x.npz",
        "missing.npz",
        "missing.npy",
        "missing/folder",
        "digits",
        "a:b:c",
        "~nobody-here/x",
    ],
)
def test_unknown_sources_are_missing_files(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    message = refused(spec, GRAY)
    assert message.startswith(f"{spec}: no such file or folder")
    assert "module:function" in message


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "d.csv").write_text("1,2")
    assert "d.csv is no data that can be read; expected FILE.npz" in refused(tmp_path / "d.csv", GRAY)


def test_no_source():
    assert "no source of data is named" in refused("", GRAY)


def test_a_model_without_inputs():
    assert "no input to feed" in refused("sklearn:digits")


# Dataset


def test_dataset_of_ones_own():
    data = Dataset([{"v": row} for row in random(5, 2)], labels=np.arange(5))
    assert [y.tolist() for _, y in data.batches(2)] == [[0, 1], [2, 3], [4]]
    assert [x["v"].shape for x, _ in itertools.islice(data.batches(2), 1)] == [(2, 2)]
    with pytest.raises(ValueError, match="batch size 0"):
        next(data.batches(0))
    with pytest.raises(DataError, match="4 labels for 5 samples"):
        Dataset(data.samples, labels=np.arange(4))


def test_lazy_samples_behave_like_a_list(tmp_path):
    np.save(tmp_path / "x.npy", random(5, 2))
    samples = load_data(str(tmp_path), inputs=[PAIR]).samples
    np.testing.assert_array_equal(samples[-1]["v"], random(5, 2)[4])
    assert len(samples[1:4]) == 3
    assert len(list(samples)) == 5
    with pytest.raises(IndexError):
        samples[5]
    with pytest.raises(IndexError, match="list index"):
        list(Lazy(1, lambda index: [][index]))
