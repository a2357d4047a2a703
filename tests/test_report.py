"""HTML report: correct numbers, self-contained, accessible, safe with hostile names."""

import base64
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_clock import FakeMeasurements

import lowrank as lr
from lowrank import compress, demo, report
from lowrank.compress import Latency
from lowrank.compress.pipeline import LayerError
from lowrank.core.tables import format_seconds
from lowrank.interop.weights import WeightsModel
from lowrank.report import charts
from lowrank.report import comparison as comparisons
from lowrank.selection import Candidate

VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Parser that collects elements and checks their nesting."""

    def __init__(self, text):
        super().__init__()
        self.open, self.all, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.all if name == tag]


def option(family, rank, error, macs):
    return Candidate(family, "", rank, error, error, lr.Cost(macs, 0, 0, 0, 0))


@pytest.fixture(scope="module")
def net():
    return WeightsModel(demo.WEIGHTS)


@pytest.fixture(scope="module")
def result(net):
    return compress.compress_model(net, macs=0.5, families=["spatial_svd", "channel_svd"])


@pytest.fixture(scope="module")
def comparison(net, result):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparisons, "Measurements", FakeMeasurements({1: 1, 2: 1.1}))
        return report.compare(
            net, result, "digits", scores=(0.9, 0.8125), notes=["<all>"], threads=1
        )


def test_costs_and_errors_are_those_of_the_chains(net, result, comparison):
    for layer, x in zip(net.layers, comparison.layers, strict=True):
        f = result.chains.get(layer.name, layer.conv)
        assert x.changed == (layer.name in result.chains)
        assert x.before["macs"] == layer.cost.macs
        assert x.after["macs"] == f.cost(layer.input_size).macs
        assert x.after["params"] == f.params
        assert x.after["bytes"] == sum(s.weight.nbytes for s in f.stages) + f.bias.nbytes
        at = lr.perfmodel.predict(f, layer.input_size, threads=1, in_network=True).seconds
        assert x.after["seconds"] == pytest.approx(at, rel=1e-6)
        if x.changed:
            assert x.kernel_error == f.error(layer.conv.to_dense())
            assert x.kernel_bound == lr.certificate(layer.conv, f).bound
            # for white noise the best chain for the outputs is the best for the kernel
            assert x.planned == pytest.approx(x.kernel_error, rel=1e-3)
    assert comparison.total("macs")[1] == sum(x.after["macs"] for x in comparison.layers)
    before, after, macs, left = comparison.measured()
    assert comparison.efficiency == pytest.approx(math.log(before / after) / math.log(macs / left))
    assert (comparison.examples, comparison.batches) == (0, 0)


def test_the_choice_is_one_of_the_options(comparison):
    for x in comparison.layers:
        assert x.front[0].is_dense
        assert x.front[0].cost.macs == x.before["macs"]
        assert (x.becomes, x.rank) in {(o.name, o.rank) for o in x.front}


def test_spectra_are_singular_values(rng):
    w = rng.standard_normal((6, 4, 3, 5))
    curves = comparisons.spectra(lr.dense(w, groups=2))
    assert list(curves) == ["outputs", "inputs", "inputs and height", "taps"]
    both = np.linalg.svd(w.reshape(2, 3, 60), compute_uv=False)
    expected = np.sqrt((both**2).sum(0))
    np.testing.assert_allclose(curves["outputs"], expected / expected[0], atol=1e-7)
    rows = w.reshape(2, 3, 4, 3, 5).transpose(0, 2, 3, 1, 4).reshape(2, 12, 15)
    expected = np.sqrt((np.linalg.svd(rows, compute_uv=False) ** 2).sum(0))
    np.testing.assert_allclose(curves["inputs and height"], expected / expected[0], atol=1e-7)
    assert comparisons.spectra(lr.dense(np.zeros((2, 2, 1))))["outputs"].tolist() == [0, 0]
    assert comparisons.spectra(lr.dense(np.ones((1, 1, 1)))) == {}


def test_the_page_loads_no_external_resources(comparison):
    text = report.render(comparison)
    assert report.render(comparison) == text
    page = Page(text)
    assert len(text) < 250_000
    fetched = {"src", "srcset", "action", "data", "xlink:href"}
    assert not [a for _, attrs in page.all for a in attrs if a in fetched or a.startswith("on")]
    links = [attrs["href"] for _, attrs in page.all if "href" in attrs]
    assert all(link.startswith("#layer") for link in links)  # glyphs and marks of a chart
    ids = [attrs["id"] for _, attrs in page.all if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert not re.search(r"url\((?!#layer)|@import|https?://", text)
    assert "default-src 'none'" in str(page.of("meta"))


def test_only_the_script_of_the_page_may_run(comparison):
    text = report.render(comparison)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_the_page_is_accessible_by_keyboard_and_screen_reader(comparison):
    page = Page(report.render(comparison))
    assert page.all[0] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag, _ in page.all if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert len(page.of("caption")) == len(page.of("table")) == 1
    assert all(attrs["scope"] in ("row", "col") for attrs in page.of("th"))
    assert len(page.of("button")) == sum(a["scope"] == "col" for a in page.of("th"))
    charts = page.of("svg")
    assert len(charts) == len(page.of("details")) == 3
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in charts)
    ids = {attrs["id"] for _, attrs in page.all if "id" in attrs}
    assert {a["aria-labelledby"] for _, a in page.all if "aria-labelledby" in a} <= ids


def test_columns_sort_by_their_values(comparison):
    page = Page(report.render(comparison))
    rows = [a["data-value"] for _, a in page.all if "data-value" in a]
    columns = len(page.of("button"))
    assert len(rows) == columns * len(comparison.layers)
    for x, cells in zip(comparison.layers, zip(*[iter(rows)] * columns, strict=True)):
        assert cells[0] == x.name
        assert [float(c) for c in cells[2:4]] == pytest.approx(x.measured)
        assert float(cells[-2]) == x.after["macs"]


def test_the_page_names_its_data_and_omissions(comparison):
    text = "".join(Page(report.render(comparison)).text)
    for words in ("white-noise", "<all>", "0.8125", "was 0.9", "efficiency:", "spatial_svd"):
        assert words in text
    bare = replace(
        comparison, scores=None, layers=tuple(replace(x, measured=None) for x in comparison.layers)
    )
    text = "".join(Page(report.render(bare)).text)
    assert "layer by layer: predicted (~)" in text
    assert "~" in text
    assert "efficiency:" not in text
    seen = "".join(Page(report.render(replace(comparison, examples=48, batches=3))).text)
    assert "48 examples in 3 batches" in seen
    part = (replace(comparison.layers[0], measured=None), *comparison.layers[1:])
    text = "".join(Page(report.render(replace(comparison, layers=part))).text)
    assert "of 2 of 3 layers" in text


def test_names_are_escaped(comparison):
    evil = '<script>alert("1")</script>\'&"><img src=x onerror=y>'
    layer = replace(comparison.layers[1], name=evil, becomes=evil, chain=evil, dense=evil)
    layer = replace(layer, front=(option(evil, (1,), 0.5, 5), *layer.front))
    layer = replace(layer, spectra={evil: np.array([1.0, 0.5])})
    plan = replace(comparison.plan, layers={evil: comparison.plan.layers["conv2"]})
    hostile = replace(comparison, name=evil, layers=(layer,), notes=(evil,), plan=plan)
    page = Page(report.render(hostile))
    tame = Page(report.render(replace(comparison, layers=comparison.layers[1:2])))
    assert {tag for tag, _ in page.all} <= {tag for tag, _ in tame.all} | {"wbr"}
    assert len(page.of("script")) == 1
    assert not page.of("img")
    assert evil in "".join(page.text)


def test_an_unchanged_network_is_reported(net):
    plan = compress.make_plan(net, macs=1.0, families=["channel_svd"])
    same = report.compare(net, compress.compress_model(net, plan), measure=False)
    assert same.total("macs")[0] == same.total("macs")[1]
    text = "".join(Page(report.render(same)).text)
    assert "No layer changed" in text
    assert "0 of 3 layers changed" in text


def test_large_layers_are_not_timed(net, result, monkeypatch):
    monkeypatch.setattr(comparisons, "Measurements", FakeMeasurements({1: 1, 2: 1.1}))
    monkeypatch.setattr(comparisons, "MAX_PREDICTED_SECONDS", 1e-9)
    assert report.compare(net, result).measured() is None
    monkeypatch.setattr(comparisons, "MAX_PREDICTED_SECONDS", 20.0)
    monkeypatch.setattr(
        comparisons, "MAX_BYTES", 4 * 128 * 16
    )  # bytes of inputs and outputs of conv3
    timed = report.compare(net, result)
    assert [x.measured is not None for x in timed.layers] == [False, False, True]
    assert timed.measured_layers == " of 1 of 3 layers"
    assert timed.measured()[:2] == timed.layers[2].measured


def test_layers_are_timed_on_the_runtime_of_the_plan(net, result, monkeypatch):
    clock = FakeMeasurements({1: 1, 2: 3})
    monkeypatch.setattr(comparisons, "Measurements", clock)
    plan = replace(result.plan, about={**result.plan.about, "runtime": "torch", "batch": 4})
    timed = report.compare(net, replace(result, plan=plan), threads=2)
    assert clock.calls == [("torch", 4, 2, True)]
    assert (timed.runtime, timed.batch, timed.threads) == ("torch", 4, 2)
    for layer, x in zip(net.layers, timed.layers, strict=True):
        macs = x.before["macs"] * 1e-9, x.after["macs"] * (3e-9 if x.changed else 1e-9)
        assert x.measured == pytest.approx(macs)
        at = lr.perfmodel.predict(
            layer.conv, layer.input_size, batch=4, threads=2, runtime="torch", in_network=True
        )
        assert x.before["seconds"] == pytest.approx(at.seconds)
    clock.unable = (2,)
    timed = report.compare(net, replace(result, plan=plan), threads=2)
    assert [x.measured is None for x in timed.layers] == [x.changed for x in timed.layers]


def test_slower_layers_are_marked(comparison):
    slow = replace(comparison.layers[1], measured=(1e-3, 2e-3))
    assert slow.is_slower
    assert slow.efficiency < 0
    fast = replace(comparison.layers[2], measured=(2e-3, 1e-3))
    assert not fast.is_slower
    text = "".join(Page(report.render(replace(comparison, layers=(slow, fast)))).text)
    assert "2 ms slower" in text
    assert "0.50×" in text
    assert "Slower than the dense layer: 1 layer." in text
    assert "slower</strong>" not in report.render(replace(comparison, layers=(fast,)))
    # A layer that was not measured is marked where its predicted time is.
    after = slow.after | {"seconds": 1.2 * slow.before["seconds"]}
    text = report.render(replace(comparison, layers=(replace(slow, measured=None, after=after),)))
    assert f"~{format_seconds(after['seconds']).replace('us', 'µs')} <strong" in text


def test_latency_comes_first_with_its_runtime_and_spread(comparison):
    latency = Latency(2e-3, 1e-3, "onnxruntime", 8, 2, 0.04, True)
    measured = replace(comparison, plan=replace(comparison.plan, latency=latency))
    text = "".join(Page(report.render(measured)).text)
    order = [text.index(w) for w in ("2 ms → 1 ms", "Your evaluation", "MACs", "Parameters")]
    assert order[0] < order[1] < order[3]
    assert "8 examples in onnxruntime on 2 threads; measured, spread 4%, the whole network" in text
    assert measured.as_dict()["latency"]["runtime"] == "onnxruntime"
    # Without a latency of the plan, its layers have a predicted one.
    unknown = replace(comparison, plan=replace(comparison.plan, latency=None))
    assert not unknown.latency.is_measured
    assert unknown.latency[:2] == unknown.total("seconds")
    assert "predicted, the layers alone" in "".join(Page(report.render(unknown)).text)
    json.dumps(unknown.as_dict(), allow_nan=False)


def test_a_refitted_dense_layer_is_labelled(net, result):
    conv = net.layers[0].conv
    new = replace(conv, stages=(replace(conv.stages[0], weight=conv.stages[0].weight * 2),))
    rows = (*result.rows, LayerError("conv1", 0.25))
    timed = report.compare(
        net, replace(result, chains=result.chains | {"conv1": new}, rows=rows), measure=False
    )
    assert timed.layers[0].becomes == "dense, new weights"
    assert timed.layers[0].kernel_error == pytest.approx(1.0)
    assert (timed.layers[0].planned, timed.layers[0].fitted) == (None, 0.25)


@pytest.mark.parametrize("shape", [(4, 4, 5), (4, 1, 3, 3), (3, 4, 3, 3, 3), (8, 8, 1)])
def test_spectra_of_every_kind_of_layer_are_drawn(shape):
    conv = lr.dense(np.random.default_rng(1).standard_normal(shape))
    curves = comparisons.spectra(conv)
    drawn = charts.draw([("spectrum", curves)], "a")
    assert curves
    assert all(f">{name}</text>" in drawn for name in curves)
    assert all(name in re.search('aria-label="(.*?)"', drawn).group(1) for name in curves)


def test_a_front_of_tiny_and_large_chains_is_drawn():
    options = [option("dense", (), 0.0, 100), option("channel_svd", (2,), 0.4, 10)]
    options += [option("cp", (1,), 0.9999, 1e-3), option("cp", (9,), 0.1, 400)]
    drawn = charts.draw([("front", (options, 100.0, (0.4, 10.0)))], "a")
    assert "4 options; chosen: error 0.400 at 10% of the MACs" in drawn
    assert "nan" not in drawn.lower()
    assert not re.search("#0[1-8]0", drawn)  # colours are those of the style sheet


def test_outliers_are_marked():
    steady, disturbed = (1e-3, 1.01e-3, 0.99e-3), (5e-4, 5.1e-4, 4.9e-4, 5e-4, 9e-4)
    assert charts.outliers(disturbed) == [False] * 4 + [True]
    drawn = charts.draw([("times", (steady, disturbed))], "a")
    assert "1 ms before, 0 outliers, 500 us after, 1 outliers" in drawn
    assert "µs per call" in charts.draw([("times", (disturbed,))], "a")


def test_repeated_measurements_are_listed(comparison):
    x = comparison.layers[1]
    assert [len(s) for s in x.samples] == [2, 2]
    text = "".join(Page(report.render(comparison)).text)
    assert "2 times" in text
    assert x.as_dict()["samples"] == [list(s) for s in x.samples]
