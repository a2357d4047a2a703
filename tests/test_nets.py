"""Third-party trained networks reproduce the results measured with the original code."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from asv_benchmarks.benchmarks import net_data, net_onnx, net_weights, nets  # noqa: E402
from lowrank.interop.torch import on_engine  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(data):
    """Run on one thread; every test here needs the data."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(data, name, key):
    return json.loads((data / "weights" / f"{name}.json").read_text())["measured"][key]


@pytest.mark.parametrize(
    ("name", "which", "percent", "apart"),
    [
        ("resnet20_cifar10", "test_lossless_500", 91.0, 0.01),  # the same images
        ("resnet20_cifar10", "test_jpeg_3000", 81.2, 0.051),
        # of 1,000 images, of which these are half: two standard errors of the other half
        ("caffe_cifar10_full", "test_lossless_500", 83.6, 2 * 1.7),
        ("caffe_cifar10_full", "test_jpeg_3000", 79.55, 2 * 0.74),
    ],
)
def test_cifar_networks_reach_the_measured_accuracy(name, which, percent, apart):
    assert (
        abs(nets.top1(net_weights.load_net(name), *net_data.cifar(name, which)) - percent) < apart
    )


def test_exact_program_keeps_every_prediction_of_resnet20():
    images, labels = net_data.cifar("resnet20_cifar10", "test_lossless_500")
    net = net_weights.load_net("resnet20_cifar10")
    exact = nets.outputs(net, images)
    found = nets.outputs(on_engine(net, images[:2], threads=1), images)
    assert torch.equal(found.argmax(1), exact.argmax(1))
    assert nets.top1(net, images, labels) == 91.0
    # twice the largest error that was seen: 19 layers by F(4x4, 3x3) add 6e-6 at most each
    assert abs(found - exact).max() <= 2 * 1.3e-6 * abs(exact).max()


def test_crepe_agrees_with_the_reference_activations():
    frames, wanted = (x[:200] for x in net_data.frames())
    found = nets.outputs(net_weights.load_net("crepe_tiny_1d").double(), frames.double())
    assert abs(found - wanted).max() < 6.6e-7  # rounding of the reference, which is float32
    found = nets.outputs(net_weights.load_net("crepe_tiny_1d"), frames)
    assert abs(found - wanted).max() < 5e-6  # 8,192 products, in whatever order


@pytest.mark.parametrize(
    ("name", "factor", "enlarge"), [("srcnn_955", 4, True), ("espcn_x3", 3, False)]
)
def test_super_resolution_reaches_the_published_psnr(data, name, factor, enlarge):
    net = net_weights.load_net(name)
    rows = measured(data, name, f"psnr_x{factor} (file, bicubic, net" + (
        "; 8 px border cut, PIL bicubic both ways)" if enlarge else ")"
    ))  # fmt: skip
    checked = 0
    for file, *wanted in rows:
        if not (data / "images" / file).exists():  # one is not in the folder
            continue
        image = net_data.image(file.removesuffix(".png"), "L")
        w, h = (n // factor * factor for n in image.size)
        truth = torch.tensor(np.asarray(image.crop((0, 0, w, h)), np.float32) / 255)
        bicubic = net_data.downscale(image, factor, True)
        found = nets.outputs(net, net_data.downscale(image, factor, enlarge)).clamp(0, 1)
        inside = (slice(8, -8), slice(8, -8))
        values = [nets.psnr(x[0, 0][inside], truth[inside], 1) for x in (bicubic, found)]
        np.testing.assert_allclose(values, wanted, atol=0.0051)  # printed with two digits
        checked += 1
    assert checked == 2


def test_style_keeps_the_picture_and_changes_its_colours():
    image = np.asarray(net_data.image("coffee", "RGB").crop((100, 0, 356, 256)), np.float32)
    x = torch.tensor(image.transpose(2, 0, 1).copy())[None]
    y = nets.outputs(net_weights.load_net("faststyle_udnie"), x)
    assert y.shape == x.shape
    assert float(y.min()) >= 0
    assert float(y.max()) <= 255
    light = np.corrcoef(x.mean(1).flatten(), y.mean(1).flatten())[0, 1]
    assert light > 0.7  # cup and saucer are where they were
    # The saucer was red; Picabia's palette is grey.
    assert float((y[:, 0] - y[:, 2]).mean()) < 0.2 * float((x[:, 0] - x[:, 2]).mean())


def test_visual_wake_words_agrees_with_the_reference_probabilities(data):
    from PIL import Image

    wanted = measured(data, "vww_mobilenet_025_96", "functional_check [non-person, person]")
    net = net_weights.load_net("vww_mobilenet_025_96")
    for file, probabilities in wanted.items():
        image = net_data.image(file.removesuffix(".png"), "RGB")
        small = np.asarray(image.resize((96, 96), Image.Resampling.BILINEAR), np.float32) / 255
        found = nets.outputs(net, torch.tensor(small.transpose(2, 0, 1).copy())[None])
        np.testing.assert_allclose(found[0], probabilities, atol=1e-5)


def test_meshnet_labels_white_matter_where_it_is_bright():
    cube = torch.tensor(net_data.volume()[96:160, 96:160, 96:160])[None, None]
    labels = nets.outputs(net_weights.load_net("meshnet3d_model20chan3cls"), cube).argmax(1)
    rest, white, grey = (cube[0][labels == k] for k in range(3))
    # 1.12 and 0.96, 0.08 and 0.13 apart within a tissue: those means are not alike by chance
    assert float(white.mean() - grey.mean()) > max(float(white.std()), 0.1)
    # Fluid is dark, and the rest has air and bone in it, too.
    assert float(rest.mean()) < float(grey.mean())


@pytest.mark.full
def test_meshnet_agrees_with_the_reference_histogram(data):
    """Label 128^3 voxels: 15 s on one thread."""
    cube = torch.tensor(net_data.volume()[64:192, 64:192, 64:192])[None, None]
    labels = nets.outputs(net_weights.load_net("meshnet3d_model20chan3cls"), cube).argmax(1)
    name = "label histogram on volumes/t1_crop.nii.gz [64:192]^3 treated as the whole input"
    wanted = measured(data, "meshnet3d_model20chan3cls", name)
    found = np.bincount(labels.flatten(), minlength=3)
    # a voxel whose classes are as likely may go either way
    assert np.abs(found - wanted).sum() <= 20


@pytest.mark.parametrize("name", net_weights.NETS)
def test_cases_are_reproducible_and_scored_against_the_original(name):
    (case,) = nets.cases(name)
    assert case.name == name
    assert not case.model.training
    first, again, other = (torch.cat(case.calibration(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    inputs, labels = case.test()
    assert first.dtype == inputs.dtype == torch.float32
    assert first.shape[1] == inputs.shape[1]
    parameters = json.loads((net_data.folder() / "weights" / f"{name}.json").read_text())[
        "parameters"
    ]
    state = case.model.state_dict().items()
    assert sum(v.numel() for k, v in state if not k.endswith("num_batches_tracked")) == parameters
    best = case.score(case.model)
    if labels is None:
        assert best == (float("inf") if case.unit.startswith("dB") else 100)
    else:
        assert 80 < best < 100
    for module in case.model.modules():  # rounded to a few levels a layer: it must be seen
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            step = module.weight.abs().max() / 3
            module.weight.copy_((module.weight / step).round() * step)
    assert case.score(case.model) < best - 2  # against the net as it was


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", net_weights.NETS)
def test_onnx_models_compute_the_same_outputs(name, dynamo):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    (case,) = nets.cases(name)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    model = net_onnx.onnx_model(case.model, case.calibration(0)[0][:2], dynamo).SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[0] == "batch"
    x = torch.cat(case.calibration(1))[:3]  # it was exported with two
    wanted = nets.outputs(case.model, x).numpy()
    (found,) = session.run(["y"], {"x": x.numpy()})
    assert list(found.shape[1:]) == session.get_outputs()[0].shape[1:]
    # thousands of products in another order, through 16 instance norms
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5 * np.abs(wanted).max())
