"""End to end: the loop writes what transformers writes, memory is what hand counting gives, wrong values are refused first."""

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
import transformers
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import LayerPrecision, PlanError, PrecisionPlan
from flexq_core.runtime.convert import quantize_model, replace_linear_layers
from flexq_core.runtime.fuse import fuse_
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources import paper
from flexq_core.sources.architectures import ARCHITECTURES
from flexq_core.sources.models import LoadedModel, ModelError, random_model
from flexq_core.studies import e2e
from flexq_core.studies.e2e import (
    METHODS,
    EndToEndStudy,
    attention,
    claims,
    decode,
    linears,
    plot_latency,
    plot_memory,
    plot_step,
    published_note,
    smoothing,
    steps,
)
from flexq_core.studies.e2e import __main__ as command
from flexq_core.studies.e2e.decode import Engine, Generation, cache_bytes, capturing, generate, total_ms
from flexq_core.studies.e2e.linears import DynamicInt8Linear, Int8WeightLinear, block_weight_bytes, model_bytes
from flexq_core.workbook import figures
from flexq_core.workbook.records import RecordError, Skipped, read_jsonl
from tests.models import CONFIGS, tiny_model
from tests.runs import run_of

SMALL = {"model": "demo-llama", "prompt_tokens": 8, "output_tokens": "2,5", "repeats": 2, "backend": "reference"}
NOTHING = paper.end_to_end().iloc[:0]


@pytest.fixture
def run(tmp_path):
    return run_of("04_e2e", tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No test depends on a time, so none is spent on making times good."""
    monkeypatch.setattr(e2e, "_WARM_UP_S", 0.0)


@pytest.fixture
def tiny(monkeypatch):
    """Every name loads a tiny LLaMA."""
    model = tiny_model("llama").requires_grad_(False)

    def load(name, **_):
        return LoadedModel(name, model, None, "sha256:tiny", 64)

    monkeypatch.setattr(e2e, "load_model", load)
    return model


def prompt(batch: int = 2, tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(2))


def written_by_transformers(model, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    model.generation_config.eos_token_id = None  # what ends a text ends no measurement
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_it_writes_what_transformers_writes(architecture):
    model, ids = tiny_model(architecture), prompt()
    expected = written_by_transformers(model, ids, 9)
    generation = generate(model, ids, 9)
    assert torch.equal(generation.tokens, expected)
    assert generation.ttft_ms > 0 and len(generation.steps_ms) == 8 and (generation.steps_ms > 0).all()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="on a processor this torch drops roundings it is told to keep")
def test_what_is_compiled_rounds_as_the_eager_model_and_writes_its_tokens(monkeypatch):
    """In bfloat16, where a fused step that keeps float32 between operations goes another way after some ten tokens."""
    model = e2e._with_parameters_in(tiny_model("llama"), torch.bfloat16)
    expected = generate(model, prompt(), 48).tokens
    compiled, made = decode._compiled, []
    monkeypatch.setattr(decode, "_compiled", lambda run, mode: made.append((run.__name__, mode)) or compiled(run, mode))
    engine = Engine(model, 2, 7, 48, "default")
    assert torch.equal(engine.generate(prompt()).tokens, expected)
    assert made == [("_run_step", "default")]
    engine.compile_prefill()
    assert made[1:] == [("_run_prefill", "default")] and engine._prefill is not engine._run_prefill
    assert torch.equal(engine.generate(prompt()).tokens, expected)


def test_a_quantised_model_writes_what_transformers_writes():
    model, ids = quantize_model(tiny_model("llama"), "flexq", backend="reference"), prompt()
    expected = written_by_transformers(model, ids, 5)
    assert torch.equal(generate(model, ids, 5).tokens, expected)


def test_a_short_output_is_the_beginning_of_a_long_one_and_one_token_has_no_steps():
    model, ids = tiny_model("opt"), prompt()
    assert torch.equal(generate(model, ids, 3).tokens, generate(model, ids, 8).tokens[:, :3])
    alone = generate(model, ids, 1)
    assert alone.tokens.shape == (2, 1) and len(alone.steps_ms) == 0


def test_a_total_is_the_first_token_and_the_steps_after_it_each_the_median_of_the_repeats():
    repeats = [
        Generation(torch.zeros(1, 3), ttft, torch.tensor(steps, dtype=torch.float64), None)
        for ttft, steps in ((10.0, [1.0, 2.0]), (11.0, [900.0, 2.5]), (99.0, [1.5, 800.0]))
    ]
    assert [total_ms(repeats, length) for length in (1, 2, 3)] == [11.0, 12.5, 15.0]


def test_model_bytes_are_counted_by_hand():
    # Untied LLaMA of tests/models.py: embeddings and head, two blocks of four square and three MLP matrices, five norms,
    # and rotary frequencies: half a head's 16 elements, kept twice.
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 176)
    model = tiny_model("llama")
    assert block_weight_bytes(model) == 4 * matrices
    assert model_bytes(model) == 4 * (matrices + 2 * 96 * 64 + 5 * 64) + _buffer_bytes(model)
    tied = tiny_model("llama-3")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176)
    assert model_bytes(tied) == 4 * (matrices + 96 * 64 + 5 * 64) + _buffer_bytes(tied)


def _buffer_bytes(model: nn.Module) -> int:
    return sum({buffer.data_ptr(): 4 * buffer.numel() for buffer in model.buffers()}.values())


def test_quantised_bytes_are_counted_by_hand():
    model = tiny_model("llama")
    rest = model_bytes(model) - block_weight_bytes(model)
    # Six bits in groups of 128, 64 features padded to 128 and 176 to 256, two bytes of scale a group, one of exponent a row.
    narrow, wide = (4 * 64 + 2 * 176) * (96 + 2 + 1), 64 * (192 + 4 + 1)
    packed = quantize_model(model, "flexq", backend="reference")
    assert block_weight_bytes(packed) == 2 * (narrow + wide)
    assert model_bytes(packed) == rest + 2 * (narrow + wide)
    weights, rows = 2 * (4 * 64 * 64 + 3 * 64 * 176), 2 * (5 * 64 + 2 * 176)
    weight_only = replace_linear_layers(model, lambda _, linear: Int8WeightLinear(linear))
    assert block_weight_bytes(weight_only) == weights + 2 * rows
    assert model_bytes(weight_only) == rest + weights + 2 * rows
    int8 = replace_linear_layers(model, lambda _, linear: linears.Int8Linear(linear))
    assert model_bytes(int8) == rest + weights + 4 * rows  # and not the rows that codes are written into
    assert linears.scratch_bytes(int8) == 2 * 17 * (6 * 64 + 176) and linears.scratch_bytes(model) == 0


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_torch_packs_out_of_sight_is_counted(architecture):
    engine = _engine()
    model = tiny_model(architecture)
    made = replace_linear_layers(model, lambda _, linear: DynamicInt8Linear(linear, engine))
    layers = linear_layers(model).values()
    weights, rows = (sum(f(layer) for layer in layers) for f in (lambda x: x.weight.numel(), lambda x: x.out_features))
    assert block_weight_bytes(made) == weights + 8 * rows
    assert model_bytes(made) == model_bytes(model) - 4 * weights + weights + 8 * rows  # biases stay as they were


def _engine() -> str:
    engines = [e for e in ("onednn", "x86", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines]
    if not engines:
        pytest.skip("this torch has no engine for dynamic INT8")
    return engines[0]


@pytest.mark.parametrize("architecture", ["llama", "llama-3", "opt"])
def test_cache_bytes_are_keys_and_values_of_every_position(architecture):
    model = tiny_model(architecture)
    cache = generate(model, prompt(batch=3), 4).cache
    heads = getattr(model.config, "num_key_value_heads", 4)
    assert (
        cache_bytes(cache, 10) == 2 * 2 * 3 * heads * 10 * 16 * 4
    )  # layers, K and V, batch, heads, tokens, size, float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(1,), (2, 3)])
def test_int8_layers_compute_the_product(bias, batch):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(*batch, 48)
    expected = linear(x)
    layers = [DynamicInt8Linear(linear, _engine())]
    try:
        linears.require_weight_only({"linear": linear})
        layers.append(Int8WeightLinear(linear))
    except Skipped as reason:
        warnings.warn(str(reason), stacklevel=1)
    for layer in layers:
        y = layer(x)
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 8, 17, 20])
def test_a_gpus_int8_layer_computes_the_product_of_its_codes_exactly(tokens):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    linear.weight[3] = 0  # a row without a scale
    layer = linears.Int8Linear(linear)
    layer(torch.randn(11, 48))  # what earlier tokens left is not seen
    x = torch.randn(1, tokens, 48)
    codes, scales = linears._int8_rows(x.view(-1, 48), torch.float32)
    sums = codes.double() @ layer.weight.double().T
    expected = sums * scales.double()[:, None] * layer.weight_scale.double() + linear.bias.double()
    assert torch.allclose(layer(x).double().view(-1, 80), expected, rtol=1e-5, atol=1e-6)
    assert (layer(x) - linear(x)).norm() < 0.03 * linear(x).norm()


def test_the_engine_of_torch_is_left_as_it_was():
    before = torch.backends.quantized.engine
    DynamicInt8Linear(nn.Linear(8, 8), _engine())
    assert torch.backends.quantized.engine == before


def test_casting_leaves_the_original_and_the_rotary_frequencies_alone():
    model = tiny_model("llama")
    cast = e2e._with_parameters_in(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in cast.buffers()} == {torch.float32}


@pytest.mark.parametrize("tokens", [1, linears._FEW_TOKENS, linears._FEW_TOKENS + 1])
def test_fp8_layers_compute_the_product_of_their_codes(tokens):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    linear.weight[3] = 0  # a row without a scale
    x = torch.randn(1, tokens, 48)
    layer = linears.Fp8Linear(linear)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight_bytes() == 48 * 80 + 4 * 80
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    codes, scales = linears._fp8_rows(x.view(-1, 48))
    expected = codes.double() * scales.double()[:, None] @ weight.T
    try:
        found = layer(x).double().view(-1, 80) - linear.bias.double()
    except RuntimeError as error:
        pytest.skip(f"this torch multiplies no FP8 rows on a processor: {error}")
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()  # the product comes in bfloat16
    assert (layer(x) - linear(x)).norm() < 0.06 * linear(x).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 40, 100])
def test_on_a_gpu_eight_bit_layers_compute_the_product(tokens):
    torch.manual_seed(0)
    linear = nn.Linear(256, 384, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    x = torch.randn(1, tokens, 256, dtype=torch.bfloat16, device="cuda")
    for kind, bound in ((linears.Fp8Linear, 0.06), (linears.Int8Linear, 0.03), (Int8WeightLinear, 0.03)):
        y = kind(linear)(x)
        assert y.shape == (1, tokens, 384) and y.dtype == torch.bfloat16
        assert (y - linear(x)).norm() < bound * linear(x).norm()


@pytest.mark.parametrize("tokens", [1, 8, 17, 20])
def test_a_layer_with_a_fixed_scale_computes_the_product_of_its_codes_and_clips(tokens):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    x = torch.randn(1, tokens, 48)
    x[0, 0, 0] = 9.0  # beyond what was seen
    layer = linears.StaticInt8Linear(linear, torch.tensor(4.0))
    codes = (x.view(-1, 48) / (4 / 127)).round().clamp(-127, 127)
    assert codes.abs().max() == 127
    expected = codes.double() @ layer.weight.double().T * (4 / 127) * layer.weight_scale.double() + linear.bias.double()
    assert torch.allclose(layer(x).double().view(-1, 80), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_smoothing_moves_outliers_into_weights_and_leaves_the_model_alone(architecture):
    model, ids = tiny_model(architecture).requires_grad_(False), prompt(tokens=32)
    norms = [(name, m) for name, m in model.named_modules() if smoothing.is_norm(m) and ".layers.0." in f".{name}."]
    for _, norm in norms:
        norm.weight[5] *= 50  # a channel of activations that one scale a layer would drown the others in
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = model(input_ids=ids).logits
    watched, ranges = copy.deepcopy(model), smoothing.Ranges()
    ranges.watch_(watched)
    watched(input_ids=ids)
    assert len(norms) == 2 and {name for name, _ in norms} <= set(ranges.norm_of.values())
    found = smoothing.smoothed(model, ranges, 0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(
        isinstance(layer, linears.StaticInt8Linear) for layer in found.modules() if hasattr(layer, "weight_scale")
    )
    error = (found(input_ids=ids).logits - expected).norm() / expected.norm()
    ranges.norm_of.clear()  # nothing is smoothed
    plain = (smoothing.smoothed(model, ranges, 0.5)(input_ids=ids).logits - expected).norm() / expected.norm()
    assert 2 * error < plain, (error, plain)


def test_smoothing_refuses_a_norm_that_adds_one_to_its_gain():
    model, ranges = tiny_model("llama").requires_grad_(False), smoothing.Ranges()
    model.model.layers[1].input_layernorm = GemmaRMSNorm(64).requires_grad_(False)
    watched = copy.deepcopy(model)
    ranges.watch_(watched)
    watched(input_ids=prompt())
    with pytest.raises(ValueError, match="GemmaRMSNorm computes something else after its channels were rescaled"):
        smoothing.smoothed(model, ranges, 0.5)


def test_ranges_hold_no_activations_once_what_was_watched_is_gone():
    model, ranges = tiny_model("llama").requires_grad_(False), smoothing.Ranges()
    ranges.watch_(model)
    outputs = []
    model.model.norm.register_forward_hook(lambda _module, _inputs, output: outputs.append(weakref.ref(output)))
    model(input_ids=prompt())
    del model
    gc.collect()
    assert outputs[0]() is None and len(ranges.norm_of) > 2


def test_ranges_come_from_other_tokens_than_those_that_are_timed(as_on_gpu):
    study = as_on_gpu("demo-llama")
    text = study.calibration
    assert text.shape == (1, min(e2e.CALIBRATION_TOKENS, study.loaded.context_length))
    assert not any(torch.equal(window, study.prompt[0]) for window in text[0].unfold(0, study.prompt_tokens, 1))
    assert torch.equal(text, study.resized(2, 5).calibration)
    ranges = study._ranges
    assert study.resized(2, 5)._ranges is ranges and ranges.largest
    assert "prompt" not in vars(study.resized(2, 5))


@pytest.fixture
def as_on_gpu(run):
    """A study of random weights that builds its models as it does on a GPU, on this processor."""

    def make(model: str, layers: int = 2) -> EndToEndStudy:
        study = EndToEndStudy(run, **SMALL | {"model": model, "weights": "random", "layers": layers})
        study.on_gpu = True
        study.loaded = study._random(keep=False)
        return study

    return make


@pytest.mark.parametrize("model", ["demo-llama", "demo-opt"])
def test_on_a_gpu_every_method_runs_in_merged_blocks_made_one_at_a_time(as_on_gpu, model):
    study = as_on_gpu(model)
    assert not linear_layers(study.loaded.model)  # none is held
    for method, least in {"fp16": 0.0, "bf16": 1e-4, "w8a8": 1e-3, "smoothquant-w8a8": 1e-3, "flexq": 1e-2}.items():
        made = study.build(method, "reference")
        names = [name.rsplit(".", 1)[-1] for name, layer in made.named_modules() if hasattr(layer, "out_features")]
        merged = ["qkv_proj", "gate_up_proj"] if model == "demo-llama" else ["qkv_proj"]
        assert all(names.count(name) == 2 for name in merged) or "w8a8" in method  # its layers tell no sizes
        assert all(type(layer).__name__.startswith("Fused") for layer in _blocks(made))
        assert len({id(m.config) for m in made.modules() if hasattr(m, "config")}) == 1
        difference = study._checked_difference(made, method)
        assert least <= difference <= 0.2


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made while this is entered: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._let_go, storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _let_go(self, storage: int) -> None:
        self.now -= self.held.pop(storage)


@pytest.mark.parametrize("method", ["fp16", "w8a8", "smoothquant-w8a8", "flexq"])
def test_of_blocks_made_one_at_a_time_a_deeper_model_holds_no_more_in_full(as_on_gpu, method):
    beside = {}
    gc.collect()
    gc.disable()  # memory that waits for the collector is memory that a GPU lacks
    try:
        for layers in (2, 5):
            study = as_on_gpu("demo-llama", layers)
            if method == "smoothquant-w8a8":
                study._ranges  # noqa: B018 - so that its own blocks are not counted
            with LiveBytes() as live:
                model = study.build(method, "reference")
            beside[layers] = live.peak - model_bytes(model)
    finally:
        gc.enable()
    block = study.loaded.model.model.layers[0]
    assert beside[5] - beside[2] < 0.05 * model_bytes(block)


def test_a_model_whose_blocks_are_made_anew_holds_none(as_on_gpu):
    study = as_on_gpu("demo-llama")
    with LiveBytes() as live:
        model = study._random(keep=False).model
    assert live.now < 1.01 * model_bytes(model)


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def test_a_plan_file_names_the_layers_of_blocks_made_one_at_a_time(as_on_gpu):
    study = as_on_gpu("demo-llama")
    layers = linear_layers(study._shapes)
    precision = {name: LayerPrecision(6, 8 if ".1." in name else 6) for name in layers}
    study.custom_plan = PrecisionPlan("second", precision)
    bits = [block.self_attn.o_proj.precision.activation_bits for block in _blocks(study.build("plan", "reference"))]
    assert bits == [6, 8]


def test_auto_means_what_a_plans_own_bits_can_run_on(run, tiny, tmp_path):
    plan = PrecisionPlan("w4", dict.fromkeys(linear_layers(tiny), LayerPrecision(4, 8)))
    (tmp_path / "plan.json").write_text(plan.to_json())
    study = EndToEndStudy(run, **SMALL | {"methods": "fp16", "plan": str(tmp_path / "plan.json"), "backend": "auto"})
    assert dict(study.cases()) == {"fp16": "torch", str(tmp_path / "plan.json"): "reference"}


def test_beside_others_what_runs_on_gpus_alone_is_skipped_on_a_processor(run, tiny):
    table = EndToEndStudy(run, **SMALL | {"methods": "fp16,smoothquant-w8a8,fp8"}).table()
    reasons = dict(zip(table["method"], table["skipped"], strict=True))
    assert reasons["smoothquant-w8a8"] == "SmoothQuant's INT8 is timed on GPUs"
    assert reasons["fp8"] == "FP8 products run on GPUs of compute capability 8.9 or later"


@pytest.mark.parametrize("full", [None, "default", "max-autotune-no-cudagraphs", "both"])
@pytest.mark.parametrize("fastest", ["default", "max-autotune-no-cudagraphs"])
def test_a_method_is_timed_in_the_mode_in_which_it_decodes_fastest(as_on_gpu, monkeypatch, fastest, full):
    """Of those for which there is memory."""
    made = []

    class Timed(Engine):
        """Compiles nothing; a step of the fastest mode takes 1 ms, of the other 2, and the first one is slow in both."""

        def __init__(self, *size, mode):
            super().__init__(*size)
            self.compile_mode = mode
            made.append(mode)

        def generate(self, prompt, output_tokens=0):
            if full in (self.compile_mode, "both"):
                raise torch.OutOfMemoryError("full")
            found = super().generate(prompt, output_tokens)
            slow = 9.0 if self.compile_mode == fastest else 8.0
            steps_ms = torch.full_like(found.steps_ms, 1.0 if self.compile_mode == fastest else 2.0)
            steps_ms[0] = slow
            return Generation(found.tokens, found.ttft_ms, steps_ms, found.cache)

    monkeypatch.setattr(e2e, "Engine", lambda *size: Timed(*size[:4], mode=size[4]))
    study = as_on_gpu("demo-llama")
    model, modes = study.build("w6a6", "reference"), ["default", "max-autotune-no-cudagraphs"]
    if full == "both":
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            study._fastest_engine(model, "reference")
        assert made == modes
    else:
        best = next(mode for mode in modes if mode != full) if full == fastest else fastest
        assert study._fastest_engine(model, "reference").compile_mode == best
        compiled_last = best == modes[-1]
        assert made == (modes if compiled_last else [*modes, best])


def test_a_record_says_on_what_its_method_ran(run, as_on_gpu):
    study = EndToEndStudy(run, **SMALL | {"methods": "fp16,bf16,w6a6"})
    study.table()
    notes = {r.method: (r.value, r.reason) for r in read_jsonl(run.records.path) if r.metric == "linear_layers"}
    layers = len(linear_layers(study.loaded.model))
    assert notes == {
        "fp32": (layers, f"{layers} × torch's float32 product"),
        "bf16": (layers, f"{layers} × torch's bfloat16 product"),
        "w6a6": (layers, f"{layers} × flexq reference"),
    }
    dtypes = {record.method: record.parameters["dtype"] for record in read_jsonl(run.records.path)}
    assert dtypes == {"fp32": "float32", "bf16": "bfloat16", "w6a6": "float32"}
    on_gpu = as_on_gpu("demo-llama")
    told = {m: linears.kernels_of(on_gpu.build(m, "reference"), 1) for m in ("w8a8", "smoothquant-w8a8")}
    assert told["w8a8"] == (8, "8 × torch._int_mm, a scale a token")
    assert told["smoothquant-w8a8"] == (8, "8 × torch._int_mm, a scale a layer")
    assert on_gpu._inputs("fp8", "torch")["dtype"] == "bfloat16"


def test_a_record_tells_the_kernels_of_a_step_and_of_the_prompt_where_they_differ(run, monkeypatch):
    monkeypatch.setattr(FlexQLinear, "backend_for", lambda _, tokens: {1: "imma"}.get(tokens, f"for {tokens}"))
    study = EndToEndStudy(run, **SMALL | {"methods": "w6a6", "prompt_tokens": 5})
    study.table()
    (note,) = [record.reason for record in read_jsonl(run.records.path) if record.metric == "linear_layers"]
    layers = len(linear_layers(study.loaded.model))
    assert note == f"{layers} × flexq imma; for the prompt {layers} × flexq for 5"


def test_a_model_that_does_not_fit_is_skipped(run, tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(EndToEndStudy, "build", full)
    table = EndToEndStudy(run, **SMALL | {"methods": "fp16"}).table()
    assert set(table["skipped"]) == {"it does not fit this GPU: CUDA out of memory. Tried to allocate 9 GiB."}


def test_a_step_in_the_middle_of_an_output_can_be_rehearsed():
    model, ids = tiny_model("llama"), prompt(batch=1)
    engine = Engine(model, 1, 7, 10)
    expected = engine.generate(ids).tokens
    step = engine.rehearse(4)
    for _ in range(4):
        step()
    assert torch.equal(engine.generate(ids).tokens, expected)  # and leaves nothing behind
    assert torch.equal(engine.generate(ids, 3).tokens, expected[:, :3])
    with pytest.raises(ValueError, match="an output of 10 tokens has no 6 steps in its middle"):
        engine.rehearse(6)


def test_kernels_that_overlap_count_once():
    kernels = [(0, 10, "w6ax_imma_kernel"), (8, 12, "norm_quantize_kernel"), (15, 20, "fmha_cutlassF"), (16, 18, "x")]
    assert steps.shares_ms([(a, b, name) for a, b, name in kernels], 2) == pytest.approx(
        {"gemm": 0.005, "attention": 0.0025, "other": 0.001, "idle": 0.0015}
    )


def test_the_kernels_of_products_are_named_with_their_shares():
    ours = "void flexq::(anonymous namespace)::w6ax_wgmma_kernel<{}>(flexq::Linear, int)"
    kernels = [(0, 4, ours.format(64)), (4, 6, ours.format(128)), (6, 8, "nvjet_hsh_64x8"), (8, 40, "fmha_cutlassF")]
    assert steps.products(kernels) == "w6ax_wgmma_kernel 75%, nvjet_hsh_64x8 25%"
    assert steps.products(kernels[3:]) == ""


_GEMM_UNIVERSAL = "cutlass::gemm::kernel::GemmUniversal"


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void flexq::(anonymous namespace)::w6ax_imma_kernel<2, 4, 4, 1>(flexq::Linear)", "w6ax_imma_kernel"),
        ("void flexq::(anonymous namespace)::w6ax_bmma_kernel<6, 1, 8, 4, false>(flexq::Linear)", "w6ax_bmma_kernel"),
        ("void flexq::<unnamed>::w6ax_wgmma_kernel<256, 64, 1, 4>(flexq::Linear, int, int, int)", "w6ax_wgmma_kernel"),
        ("nvjet_sm90_hsh_128x8_64x12_4x1_v_bz_splitK_TNT", "nvjet_sm90_hsh_128x8_64x12_4x1_v_bz_splitK_TNT"),
        (
            "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_execute_segment_k_off_kernel__5x_cublas",
            "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_execute_segment_k_off_kernel__5x_cublas",
        ),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float>(cublasLt::cublasSplitKParams<float>)",
            "cublasLt::splitKreduce_kernel",
        ),
        (
            "void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>(int)",
            "gemv2T_kernel_val",
        ),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __half>(cublasGemvParamsEx<int>)",
            "internal::gemvx::kernel",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_f16_64x64_32x6_tn_align8>(Params)",
            "cutlass_80_tensorop_s16816gemm_f16_64x64_32x6_tn_align8",
        ),
        (f"void cutlass::device_kernel<{_GEMM_UNIVERSAL}<cute::tuple<int, int> > >(Params)", _GEMM_UNIVERSAL),
        (
            f"void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<{_GEMM_UNIVERSAL}<int> > >(Params)",
            _GEMM_UNIVERSAL,
        ),
        ("void cutlass::device_kernel<Custom>(Params)", "cutlass::device_kernel"),
        ("triton_tem_fused_mm_3", "triton_tem_fused_mm_3"),
        ("triton_red_fused__to_copy_mm_mul_0", "triton_red_fused__to_copy_mm_mul_0"),
    ],
)
def test_a_product_has_a_name_that_a_reader_knows(kernel, name):
    assert steps.part_of(kernel) == "gemm"
    assert steps.product_name(kernel) == name


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("void flexq::w6ax_wgmma_kernel<8>", "gemm"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "gemm"),
        ("void gemv2T_kernel_val<int>", "gemm"),
        ("triton_tem_fused_mm_3", "gemm"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("triton_per_fused__softmax_add_2", "attention"),
        ("void flexq::w6ax_imma_row_kernel<16, 3>", "gemm"),
        ("attention_kernel", "attention"),
        ("triton_poi_fused_cat_index_copy_one_token_attention_3", "other"),
        ("void flexq::norm_quantize_kernel<__half>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_belong_to_parts_of_a_step_by_name(kernel, part):
    assert steps.part_of(kernel) == part


def test_llama_13b_takes_less_than_half_with_its_longest_cache():
    """Weights and the keys and values of 2048 positions, FP16 over 6 bits; nothing is allocated."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["llama-13b"].config(), dtype=torch.float16)
        linear = linear_layers(model)
        six = sum(FlexQLinear(x.in_features, x.out_features, bias=False).weight_bytes() for x in linear.values())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    rest = whole - sum(layer.weight.nbytes for layer in linear.values())
    cache = 2 * 40 * 5120 * 2048 * 2
    assert (whole + cache) / (rest + six + cache) >= 2.28


def test_a_step_reads_all_but_the_embedding():
    model = tiny_model("llama")
    cache = generate(model, prompt(batch=3), 4).cache
    assert steps.step_bytes(model, cache, 10) == model_bytes(model) - 4 * 96 * 64 + cache_bytes(cache, 10)
    tied = tiny_model("llama-3")
    assert steps.step_bytes(tied, cache, 10) == model_bytes(tied) + cache_bytes(cache, 10)


def test_the_figure_of_a_step_shows_its_parts_and_limit(tmp_path):
    assert plot_step(synthetic().assign(step_gemm_ms=float("nan")), "name") is None
    parts = {"step_gemm_ms": 2.0, "step_attention_ms": 0.5, "step_other_ms": 0.4, "step_idle_ms": 0.1, "limit_ms": 1.5}
    figure = plot_step(synthetic().assign(**parts), "name")
    assert figure.axes[0].get_xlabel() == "a decode step, name (ms)"
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"gemm", "attention", "other", "idle", "limit: bytes / bandwidth"}
    figure.savefig(tmp_path / "figure.svg")


def test_the_command_line_measures_keeps_records_and_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    size = ["--model", "demo-llama", "--weights", "random", "--layers", "1", "--prompt-tokens", "4", "--repeats", "1"]
    arguments = [*size, "--methods", "fp16", "w6a6", "--backend", "reference", "--output-tokens", "2"]
    assert command.main([*arguments, "--outputs", str(tmp_path)]) == 0
    assert {record.method for record in read_jsonl(tmp_path / "records" / "04_e2e.jsonl")} == {"fp32", "w6a6"}
    assert "tpot_ms" in capsys.readouterr().out
    kept = read_jsonl(tmp_path / "records" / "04_e2e.jsonl")
    other = ["demo-opt" if argument == "demo-llama" else argument for argument in arguments]
    assert command.main([*other, "--outputs", str(tmp_path)]) == 0
    both = read_jsonl(tmp_path / "records" / "04_e2e.jsonl")
    assert both[: len(kept)] == kept and {record.model for record in both} == {"demo-llama", "demo-opt"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main([*arguments, "--outputs", "outputs/{card}"])
    assert "outputs/{card} is named after a GPU, and torch finds none here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--model", "demo-llama", "--repeats", "0"])
    assert "repeats is 0; accepted: 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--model", "demo-llama", "--output-tokens", "8", "0"])
    assert "--output-tokens: '0' given; accepted: whole numbers of 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--model", "demo-lama"])
    assert "Did you mean 'demo-llama'?" in capsys.readouterr().err
    monkeypatch.setattr(command.EndToEndStudy, "table", lambda _: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main([*arguments, "--outputs", str(tmp_path / "file" / "more")])
    assert "file/more cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [(KeyboardInterrupt(), 130, "the same command goes on from what is on record"), (RecordError("full"), 1, "full")],
)
def test_what_ends_the_command_is_one_line(monkeypatch, capsys, raised, status, text):
    def ends(_):
        raise raised

    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.EndToEndStudy, "table", ends)
    assert command.main(["--weights", "random", "--layers", "1", "--methods", "w6a6"]) == status
    told = capsys.readouterr().err
    assert text in told and "Traceback" not in told


def test_the_command_line_sweeps_batch_sizes_and_prompts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    size = [
        "--model",
        "demo-llama",
        "--weights",
        "random",
        "--layers",
        "1",
        "--repeats",
        "1",
        "--outputs",
        str(tmp_path),
    ]
    sweep = ["--batch-size", "1", "2", "--prompt-tokens", "4", "6", "--output-tokens", "2", "3"]
    arguments = [*size, *sweep, "--methods", "fp16", "w6a6", "--backend", "reference"]
    monkeypatch.setattr(EndToEndStudy, "_load", once(EndToEndStudy._load))
    assert command.main(arguments) == 0
    records = read_jsonl(tmp_path / "records" / "04_e2e.jsonl")
    sizes = [(batch, tokens) for batch in (1, 2) for tokens in (4, 6)]
    assert list(dict.fromkeys((r.parameters["batch_size"], r.parameters["prompt_tokens"]) for r in records)) == sizes
    told = capsys.readouterr().out
    assert all(f"batch {batch}, {tokens} prompt tokens" in told for batch, tokens in sizes)
    caches = {
        (r.parameters["batch_size"], r.parameters["prompt_tokens"], r.metric[-1]): r.value
        for r in records
        if r.metric.startswith("kv_cache_mib/") and r.method == "w6a6"
    }
    assert all(value == caches[1, 4, "2"] * b * (p + int(length)) / 6 for (b, p, length), value in caches.items())
    assert len(caches) == 8
    drawn = {path.name for path in (tmp_path / "figures").rglob("*.svg")}
    assert drawn == {f"{kind}-batch-{b}-prompt-{p}.svg" for kind in ("latency", "memory") for b, p in sizes}
    (tmp_path / "records" / "04_e2e.jsonl").unlink()
    with pytest.raises(SystemExit):
        command.main([*arguments, "--prompt-tokens", "4", "99999"])
    assert "99999 prompt and 3 output tokens are 100002; accepted: up to" in capsys.readouterr().err
    assert not (tmp_path / "records" / "04_e2e.jsonl").exists()


def once(load):
    """A model is loaded once a command, whatever its sizes."""
    loaded = []

    def wrapped(study):
        loaded.append(study)
        assert len(loaded) <= 2  # the second is refused before anything is measured
        return load(study)

    return wrapped


@pytest.mark.parametrize("collects", [True, False])
def test_no_graph_ends_while_another_is_captured(monkeypatch, collects):
    """Neither one whose engine ended before, nor one that could be collected within; and then the collector does as it did."""
    taken = []
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **options: nullcontext(taken.append((given, options))))
    engine, graph = Engine(tiny_model("llama"), 1, 2, 3), nn.Module()
    engine._step = graph.forward  # as a replay
    engine.circle, ended = engine, weakref.ref(graph)
    del engine, graph
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), capturing("graph", pool="pool"):  # noqa: PT012
            assert ended() is None
            assert not gc.isenabled()
            1 / 0  # noqa: B018 - as a capture that fails
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
    assert taken == [(("graph",), {"pool": "pool"})]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("backend", ["auto", "bmma"])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_captured_steps_write_the_eager_models_tokens(architecture, backend, ours, batch_size):
    """With one sequence a step is the product of a row."""
    model = quantize_model(tiny_model(architecture).cuda().half(), "flexq", backend=backend)
    model.set_attn_implementation(attention.implementation("cuda" if ours else "cpu"))
    ids = prompt().cuda()[:batch_size]
    for each in (model, fuse_(copy.deepcopy(model))):
        engine = Engine(each, batch_size, 7, 9)
        expected = engine.generate(ids).tokens
        engine.warm_up(ids)
        assert engine.capture() == (architecture != "mistral")  # whose cache slides
        for _ in range(3):
            assert torch.equal(engine.generate(ids).tokens, expected)
        engine.uncapture()
        assert torch.equal(engine.generate(ids).tokens, expected)
        assert engine.capture() == (architecture != "mistral")
        assert torch.equal(engine.generate(ids).tokens, expected)


@pytest.mark.gpu
def test_one_token_is_the_prefills_and_no_step_is_captured():
    model = quantize_model(tiny_model("llama").cuda().half(), "flexq")
    ids = prompt().cuda()[:1]
    expected = Engine(model, 1, 7, 1).generate(ids).tokens
    engine = Engine(model, 1, 7, 1, "default")
    engine.warm_up(ids)
    assert engine.capture() and torch.equal(engine.generate(ids).tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [False, True])
def test_after_a_long_prompt_a_model_writes_the_same_each_time_captured_or_not(ours):
    """Of a length with which cuDNN's attention does not."""
    model = random_model("llama-7b", device="cuda", layers=8, seed=0).model
    model.set_attn_implementation(attention.implementation("cuda" if ours else "cpu"))
    ids = torch.randint(32000, (1, 992), generator=torch.Generator().manual_seed(0)).cuda()
    engine = Engine(model, 1, 992, 32)
    eager = [engine.generate(ids).tokens for _ in range(3)]
    engine.warm_up(ids)
    assert engine.capture()
    for found in (*eager, *(engine.generate(ids).tokens for _ in range(3))):
        assert torch.equal(found, eager[0])


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"methods": "fp16,flexk"},
            ValueError,
            r"no method is called 'flexk' \(did you mean 'flexq'\?\); accepted: fp16",
        ),
        ({"methods": " "}, ValueError, "no method is given; accepted: fp16, bf16"),
        (
            {"methods": "fp8,smoothquant-w8a8"},
            ValueError,
            "'fp8,smoothquant-w8a8', which run on GPUs alone; accepted on a processor: one of fp16, bf16, w8a16, w8a8, w6a6",
        ),
        ({"weights": "foo"}, ValueError, "no weights is called 'foo'; accepted: pretrained, random"),
        ({"weights": "pretrained,random"}, ValueError, "accepted: one of pretrained, random"),
        ({"compile_mode": "fast"}, ValueError, "no compile_mode is called 'fast'"),
        (
            {"compile_mode": "default"},
            ValueError,
            "'default', which wants a GPU, Triton and one process; accepted here",
        ),
        ({"backend": "gpu"}, ValueError, "no backend is called 'gpu'"),
        ({"output_tokens": "0"}, ValueError, "output_tokens holds '0'; accepted: whole numbers of 1 or more"),
        ({"output_tokens": "32,x"}, ValueError, "output_tokens holds 'x'; accepted"),
        ({"output_tokens": ""}, ValueError, "output_tokens is empty; accepted"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens is 0; accepted: 1 or more"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; accepted: 1 or more"),
        ({"repeats": 0}, ValueError, "repeats is 0; accepted: 1 or more"),
        ({"layers": -1}, ValueError, "layers is -1; accepted: 0 or more"),
        ({"seed": -1}, ValueError, "seed is -1; accepted: 0 or more"),
        ({"layers": 2}, ValueError, "layers is 2 with pretrained weights; accepted: 0, or weights=random"),
        ({"layers": 7, "weights": "random"}, ValueError, "layers is 7; accepted: 0 for all, or up to the model's 6"),
        (
            {"prompt_tokens": 500, "output_tokens": "4,13"},
            ValueError,
            "500 prompt and 13 output tokens are 513; accepted: up to 512, the context of 'demo-llama'",
        ),
        ({"model": "demo-lama"}, ModelError, "no model is called 'demo-lama'. Did you mean 'demo-llama'?"),
        ({"model": "owner/name", "weights": "random"}, ModelError, "the shape of 'owner/name' is not known here"),
        ({"plan": "no.json"}, PlanError, "cannot read the plan 'no.json'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_computed(run, changed, error, text):
    with pytest.raises(error, match=text):
        EndToEndStudy(run, **SMALL | changed)
    assert not run.records.path.exists()


@pytest.mark.parametrize(
    ("changed", "text"),
    [({"layers": 33}, "up to the model's 32"), ({"prompt_tokens": 2048}, "the context of 'llama-7b'")],
)
def test_what_a_random_model_does_not_have_is_said_before_it_is_made(run, monkeypatch, changed, text):
    monkeypatch.setattr("flexq_core.studies.e2e.random_model", None)
    with pytest.raises(ValueError, match=text):
        EndToEndStudy(run, **SMALL | {"model": "llama-7b", "weights": "random"} | changed)


def test_a_folder_that_is_no_model_is_refused(run, tmp_path):
    with pytest.raises(ModelError, match="holds no config.json: it is not a transformers model"):
        EndToEndStudy(run, **SMALL | {"model": str(tmp_path)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the model"):
        EndToEndStudy(run, **SMALL | {"model": str(tmp_path)})
    with pytest.raises(ModelError, match="cannot read the shape of"):
        EndToEndStudy(run, **SMALL | {"model": str(tmp_path), "weights": "random"})


def test_a_plan_of_another_model_is_refused(run, tiny, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PrecisionPlan.from_rule("w6a6", linear_layers(tiny_model("opt"))).to_json())
    with pytest.raises(PlanError, match="does not fit the model"):
        EndToEndStudy(run, **SMALL | {"plan": str(path)})


def test_random_weights_need_no_tokenizer_and_layers_are_counted(run):
    study = EndToEndStudy(run, **SMALL | {"weights": "random", "layers": 2})
    assert study.loaded.model.config.num_hidden_layers == 2
    assert study.prompt.shape == (1, 8)


def test_random_weights_are_checked_on_two_blocks_of_the_models_shapes(run):
    deep, shallow = (
        EndToEndStudy(run, **SMALL | {"weights": "random", "layers": layers, "methods": "w6a6"}) for layers in (4, 2)
    )
    found = [study.measure("w6a6", "reference")["difference"] for study in (deep, shallow)]
    assert found[0] == found[1] > 0
    notes = {
        record.parameters["layers"]: record.reason
        for record in read_jsonl(run.records.path)
        if record.metric == "difference"
    }
    assert notes == {4: "of 2 blocks", 2: ""}
    assert shallow._checked is shallow and deep._checked is not deep
    assert len(deep.build("w6a6", "reference").model.layers) == 4  # what is timed has them all


def test_every_case_is_a_row_a_length_and_its_records(run, tiny, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PrecisionPlan.from_rule("w6a8", linear_layers(tiny)).to_json().replace('"w6a8"', '"mine"'))
    study = EndToEndStudy(run, **SMALL | {"plan": str(path), "batch_size": 2})
    table = study.table()
    assert list(dict.fromkeys(table["method"])) == ["fp32", *METHODS[1:], "plan:mine"]
    assert list(table["output_tokens"]) == [2, 5] * len(study.methods)
    measured = table.dropna(subset=["total_s"])
    assert {"fp32", "bf16", "w6a6", "flexq", "w6a8", "plan:mine"} <= set(measured["method"])
    assert (measured["tokens_per_s"] * measured["total_s"] - 2 * measured["output_tokens"]).abs().max() < 1e-9
    assert (measured["ttft_ms"] / 1e3 < measured["total_s"]).all()
    fp32, bf16 = (measured[measured["method"] == method].iloc[-1] for method in ("fp32", "bf16"))
    assert fp32["linear_weights_mib"] == 2 * bf16["linear_weights_mib"] == 4 * 2 * (4 * 64 * 64 + 3 * 64 * 176) / 2**20
    assert fp32["kv_cache_mib"] == 2 * bf16["kv_cache_mib"] == 2 * 2 * 2 * 64 * 13 * 4 / 2**20
    assert fp32["difference"] == 0 < bf16["difference"]
    records = read_jsonl(run.records.path)
    assert {r.unit for r in records if r.metric.startswith(("ttft", "tpot"))} == {"ms"}
    assert all(r.parameters["device"] == r.device and r.parameters["threads"] for r in records)


def test_what_is_on_record_is_not_measured_again_and_another_machine_measures_anew(run, tiny, monkeypatch):
    settings = SMALL | {"methods": "fp16,flexq"}
    first = EndToEndStudy(run, **settings).table()
    monkeypatch.setattr(EndToEndStudy, "_measured", lambda *_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(EndToEndStudy(run, **settings).table(), first)
    monkeypatch.setattr(e2e, "provenance", lambda device: {"device": "another"})
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        EndToEndStudy(run, **settings).table()


def test_a_wrong_product_is_not_timed(run, tiny, monkeypatch):
    def zeroed(model, plan, **_):
        return replace_linear_layers(model, lambda _, linear: _Zero(linear.out_features))

    monkeypatch.setattr(e2e, "quantize_model", zeroed)
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"flexq is not timed: its logits differ .*, bound 0.5"):
        EndToEndStudy(run, **SMALL | {"methods": "flexq"}).table()
    assert not run.records.path.exists()


class _Zero(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.outputs)


def test_a_method_that_cannot_run_is_skipped_with_its_reason(run, tiny, monkeypatch):
    def cannot(*_):
        raise RuntimeError("not for this processor\nmore")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", cannot)
    table = EndToEndStudy(run, **SMALL | {"methods": "w8a16"}).table()
    reason = "torch's INT8 weight-only product does not run here: not for this processor"
    assert set(table["skipped"]) == {reason} and table["total_s"].isna().all()
    assert read_jsonl(run.records.path)[0].status == "skipped"
    assert claims(table) == [("FlexQ is measured", None, "methods name none of FlexQ's")]


def test_a_torch_without_int8_is_skipped(run, tiny, monkeypatch):
    monkeypatch.setattr(linears, "_INT8_ENGINES", ())
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", [], raising=False)
    table = EndToEndStudy(run, **SMALL | {"methods": "w8a8"}).table()
    assert set(table["skipped"]) == {"this torch has no engine for dynamic INT8"}


def test_only_a_whole_paper_model_stands_beside_the_paper(run, monkeypatch, tiny):
    monkeypatch.setattr(e2e, "random_model", lambda name, **_: LoadedModel(name, tiny, None, "random", 2048))
    whole = EndToEndStudy(run, **SMALL | {"model": "llama-7b", "weights": "random"})
    assert set(whole.published()["model"]) == {"llama-7b"}
    assert whole.resized(4, 8).published().empty and not whole.published().empty
    assert EndToEndStudy(run, **SMALL | {"model": "llama-7b", "weights": "random", "layers": 1}).published().empty
    assert EndToEndStudy(run, **SMALL | {"model": "demo-llama", "weights": "random"}).published().empty


def synthetic(**changes) -> pd.DataFrame:
    """A table in which every claim holds; changes: method → {column: value}, or None to leave it out."""
    sizes = {"fp32": 320.0, "w8a16": 80.5, "w8a8": 81.0, "w6a6": 61.5, "flexq": 61.5}
    steps = {"fp32": 10.0, "w8a16": 4.0, "w8a8": 3.5, "w6a6": 3.0, "flexq": 3.0}
    rows = [
        {
            "method": method,
            "backend": "cpu" if method in ("w6a6", "flexq") else "torch",
            "output_tokens": length,
            "ttft_ms": 20.0,
            "tpot_ms": steps[method],
            "total_s": (20 + (length - 1) * steps[method]) / 1e3,
            "linear_weights_mib": sizes[method],
            "weights_mib": sizes[method] + 20,
            "kv_cache_mib": length / 8,
            "preemptions_per_token": 0.0,
            **(changes.get(method) or {}),
        }
        for method in sizes
        for length in (32, 128)
        if changes.get(method, {}) is not None
    ]
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> list[bool | None]:
    return [None if holds is None else bool(holds) for _, holds, _ in claims(table)]


def test_claims_hold_where_the_table_bears_them_out():
    found = claims(synthetic())
    assert [text for text, _, _ in found] == [
        "FlexQ's linear weights take less than 25% of the unquantised model's",
        "FlexQ's linear weights take at most 85% of INT8's",
        "FlexQ decodes a token faster than FP32",
        "FlexQ decodes a token in at most 1.1 of the time of W8A8, torch",
    ]
    assert verdicts(synthetic()) == [True] * 4
    assert found[2][2] == "3.00 and 10.00 ms a token, 3.33 ×"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flexq": {"linear_weights_mib": 79.0}}, [True, False, True, True]),
        ({"flexq": {"linear_weights_mib": 80.5}}, [False, False, True, True]),
        ({"flexq": {"tpot_ms": 3.8}}, [True, True, True, True]),
        ({"flexq": {"tpot_ms": 3.9}}, [True, True, True, False]),
        ({"flexq": {"tpot_ms": 11.0}}, [True, True, False, False]),
        ({"flexq": {"backend": "reference"}}, [True, True, None, None]),
        ({"flexq": {"preemptions_per_token": 9.0}}, [True, True, None, None]),
        ({"w8a8": {"preemptions_per_token": 9.0}}, [True, True, True, None]),
        ({"flexq": {"tpot_ms": float("nan")}}, [True, True, None, None]),
        ({"fp32": {"linear_weights_mib": 49.0}}, [False, True, True, True]),
        ({"fp32": None}, [True, None]),
        ({"w8a8": None}, [True, True, True, True]),
        ({"w8a8": None, "w8a16": None}, [True, True]),
        ({"flexq": None}, [True] * 4),
    ],
    ids=str,
)
def test_claims_fail_or_are_skipped_where_it_does_not(changes, expected):
    assert verdicts(synthetic(**changes)) == expected


def test_a_model_too_small_for_weights_to_matter_tells_no_speed():
    table = synthetic()
    table["linear_weights_mib"] /= 10
    assert verdicts(table) == [True, True, None, None]
    assert "32 MiB of linear weights are too few to matter" in claims(table)[2][2]


def on_a_gpu(**changes) -> pd.DataFrame:
    """A whole model's table on a GPU, in which the ratios of LLaMA-13B are just reached; changes: as for `synthetic`."""
    steps = {"fp16": 8.0, "w8a8": 5.32, "fp8": 4.8, "flexq": 4.0}
    sizes = {"fp16": 2280.0, "w8a8": 1240.0, "fp8": 1240.0, "flexq": 1000.0}
    rows = [
        {"method": method, "backend": "imma", "output_tokens": 128, "ttft_ms": 20.0, "tpot_ms": steps[method]}
        | {"weights_mib": sizes[method] * 0.9, "kv_cache_mib": sizes[method] * 0.1, "preemptions_per_token": 0.0}
        | {"linear_weights_mib": sizes[method] * 0.8, **(changes.get(method) or {})}
        for method in steps
        if changes.get(method, {}) is not None
    ]
    return pd.DataFrame(rows)


RATIOS = [
    "llama-13b: FlexQ decodes a token at least 2.0 times as fast as FP16",
    "llama-13b: FlexQ decodes a token at least 1.33 times as fast as W8A8, torch",
    "llama-13b: FlexQ decodes a token at least 1.2 times as fast as FP8, torch",
    "llama-13b: FlexQ's weights and cache take at most 1 / 2.28 of FP16's",
    "llama-13b: FlexQ's weights and cache take at most 1 / 1.24 of W8A8, torch's",
    "llama-13b: FlexQ's first token after 128 takes no longer than FP16's",
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 6),
        ({"flexq": {"tpot_ms": 4.01}}, [False] * 3 + [True] * 3),
        ({"w8a8": {"tpot_ms": 5.31}}, [True, False] + [True] * 4),
        ({"flexq": {"kv_cache_mib": 101.0}}, [True] * 3 + [False, False, True]),
        ({"flexq": {"ttft_ms": 20.1}}, [True] * 5 + [False]),
        ({"fp16": None}, [None, True, True, None, True, None]),
        ({"w8a8": None}, [True, None, True, True, None, True]),
        ({"fp8": None}, [True, True, None, True, True, True]),
        ({"fp16": {"tpot_ms": float("nan")}}, [None] + [True] * 5),
        ({"flexq": {"tpot_ms": float("nan")}}, [None] * 3 + [True] * 3),
        ({"flexq": {"backend": "reference"}}, [None] * 3 + [True, True, None]),
        ({"flexq": {"preemptions_per_token": 9.0}}, [None] * 3 + [True, True, None]),
        ({"w8a8": {"preemptions_per_token": 9.0}}, [True, None] + [True] * 4),
    ],
    ids=str,
)
def test_of_a_whole_paper_model_on_a_gpu_ratios_are_claimed(changes, expected):
    found = [claim for claim in claims(on_a_gpu(**changes), "llama-13b") if "SmoothQuant" not in claim[0]][-6:]
    assert [text for text, _, _ in found] == RATIOS
    assert [holds for _, holds, _ in found] == expected
    (changed,) = changes.values() or [{}]
    reasons = {
        "was not measured here": changed is None,
        "outputs of one token have no decode step": "tpot_ms" in (changed or {}),
        "the reference backend is no kernel": "backend" in (changed or {}),
        "the machine is busy with other work: 9.0 preemptions a token": "preemptions_per_token" in (changed or {}),
    }
    (reason,) = [reason for reason, here in reasons.items() if here] or ["nothing"]
    assert all((holds is None) == detail.endswith(reason) for _, holds, detail in found)


def test_other_models_on_a_gpu_have_their_own_claims():
    told = {model: [text for text, _, _ in claims(on_a_gpu(), model)[2:]] for model in ("llama-7b", "llama-2-7b", "")}
    assert told["llama-7b"] == [
        "llama-7b: FlexQ decodes a token at least 1.9 times as fast as FP16",
        "llama-7b: FlexQ's first token after 128 takes no longer than FP16's",
        "FlexQ decodes a token faster than W8A8, torch",
        "FlexQ decodes a token faster than FP8, torch",
    ]
    assert claims(on_a_gpu(fp16=None), "llama-7b")[-1][1:] == (
        None,
        "4.00 and 4.80 ms a token, 1.20 ×; the unquantised model was not measured here",
    )
    assert told["llama-2-7b"][0] == told[""][0] == "FlexQ decodes a token faster than FP16"
    assert told["llama-2-7b"][1:] == told["llama-7b"][2:] and "at most 1.1" in told[""][1]
    assert claims(on_a_gpu(), "llama-13b")[3][2] == "4 and 5.32 ms a token, 1.33 ×"


def test_smoothquant_has_the_bars_of_int8():
    table = on_a_gpu()
    smooth = table[table["method"] == "w8a8"].assign(method="smoothquant-w8a8", tpot_ms=5.31)
    found = {text: holds for text, holds, _ in claims(pd.concat([table, smooth]), "llama-13b") if "SmoothQuant" in text}
    assert found == {
        "llama-13b: FlexQ decodes a token at least 1.33 times as fast as W8A8, SmoothQuant": False,
        "llama-13b: FlexQ's weights and cache take at most 1 / 1.24 of W8A8, SmoothQuant's": True,
    }


@pytest.mark.parametrize(("ttft_ms", "holds"), [(20.0, True), (20.1, False)])
def test_after_a_long_prompt_the_first_token_is_claimed(ttft_ms, holds):
    found = claims(on_a_gpu(flexq={"ttft_ms": ttft_ms}), "llama-13b", 1024)[2:]
    assert found[0][:2] == ("llama-13b: FlexQ's first token after 1024 takes no longer than FP16's", holds)
    assert not [text for text, _, _ in found if "times as fast" in text or "cache" in text]


def test_tokens_are_claimed_to_be_the_eager_models():
    text = "FlexQ's tokens of the captured step are those of the eager model"
    table = on_a_gpu().assign(tokens_as_eager=64, tokens_compared=64)
    assert (text, True, "64 of 64") in claims(table)
    compiled = "23 of 64; torch compiled the model, which may round a near tie to the other side"
    assert (text, None, compiled) in claims(table.assign(tokens_as_eager=23))
    assert (text, False, compiled.replace("23", "0")) in claims(table.assign(tokens_as_eager=0))
    assert text not in [claim for claim, _, _ in claims(on_a_gpu())]


def test_captured_tokens_must_be_the_eager_models_where_those_repeat():
    eager, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])
    whole = torch.tensor([[1, 2, 3, 9]])
    assert e2e.tokens_as_eager(whole, [eager, eager], exact=True) == (3, "token", "of 3")
    assert e2e.tokens_as_eager(whole, [other, other], exact=False) == (2, "token", "of 3")  # compiled
    with pytest.raises(RuntimeError, match="differ from the eager model's from token 2 on"):
        e2e.tokens_as_eager(whole, [other, other], exact=True)
    unsteady = "of 3; the eager model's own differ"
    assert e2e.tokens_as_eager(whole, [other, eager], exact=True) == (3, "token", unsteady)
    two = torch.cat([whole, whole.flip(1)])  # sequences: the first that differs ends it for all
    assert e2e.tokens_as_eager(two, [two[:, :3] + torch.tensor([[0], [1]])] * 2, exact=False).value == 0


def test_fp16_is_no_straw_man():
    text = "llama-13b: FP16 takes at most 1.36 × as long for a token as its bytes"
    for limit_ms, holds in ((5.9, True), (5.8, False)):
        found = claims(on_a_gpu().assign(limit_ms=limit_ms), "llama-13b")
        assert (text, holds, f"8 ms a token, its bytes take {limit_ms} ms, {8 / limit_ms:.2f} ×") in found
    assert text not in [claim for claim, _, _ in claims(on_a_gpu(fp16=None).assign(limit_ms=6.0), "llama-13b")]
    one_token = on_a_gpu().assign(limit_ms=6.0, tpot_ms=float("nan"))
    assert (text, None, "outputs of one token have no decode step") in claims(one_token, "llama-13b")


@pytest.mark.parametrize(
    ("changed", "card"),
    [
        ({}, "NVIDIA H100 80GB HBM3"),
        ({"prompt_tokens": 1024}, "NVIDIA H100 80GB HBM3"),
        ({}, "NVIDIA H200"),
        ({}, "NVIDIA A100-SXM4-80GB"),
        *(({name: value}, "NVIDIA H200") for name, value in (("on_gpu", False), ("layers", 2), ("batch_size", 2))),
        ({"prompt_tokens": 8}, "NVIDIA H200"),
    ],
    ids=str,
)
def test_ratios_are_claimed_of_one_sequence_of_a_whole_model_on_one_hopper_card(run, monkeypatch, changed, card):
    study = EndToEndStudy(run, **SMALL | {"prompt_tokens": 128})
    monkeypatch.setattr(e2e, "provenance", lambda device: {"device": card})
    for name, value in ({"on_gpu": True} | changed).items():
        setattr(study, name, value)
    refused = "A100" in card or (changed and changed != {"prompt_tokens": 1024})
    assert study.ratios_model == ("" if refused else "demo-llama")


def test_half_precision_counts_as_half():
    table = synthetic(fp32={"method": "fp16", "linear_weights_mib": 160.0})
    assert claims(table)[0][:2] == ("FlexQ's linear weights take less than 50% of the unquantised model's", True)


def test_a_legend_shows_the_colours_that_are_drawn():
    """A key in ink alone would be the colour of FP16."""
    for plot in (plot_latency, plot_memory):
        figure = plot(synthetic(), "name", NOTHING)
        drawn = {patch.get_facecolor() for patch in figure.axes[0].patches}
        keys = {patch.get_facecolor() for patch in figure.legends[0].findobj(Patch)}
        methods = {to_rgba(figures.method_colour(method)) for method in synthetic()["method"]}
        assert methods <= drawn and methods <= keys


def test_what_the_paper_copied_is_starred_and_told():
    table = paper.end_to_end()
    opt, other = table[table["model"] == "opt-30b"], table[table["model"] == "llama-13b"]
    assert published_note(opt) == (
        "* Of the paper's memory bars those at 512 tokens (W8A16, W8A8, FlexQ) and 1024 tokens (FP16) equal llama-30b's to "
        "the last digit."
    )
    assert published_note(other) == published_note(NOTHING) == ""
    for published, starred in ((opt, ["FP16 *"]), (other, [])):
        labels = [label.get_text() for label in plot_memory(synthetic(), "name", published).axes[1].get_yticklabels()]
        assert [label for label in labels if label.endswith("*")] == starred


@pytest.mark.parametrize(
    "published", [NOTHING, paper.end_to_end().query("model == 'llama-7b'")], ids=["alone", "beside"]
)
def test_figures_show_every_method_with_units(published, tmp_path):
    table = pd.concat([synthetic(), pd.DataFrame([{"method": "w6a8", "output_tokens": 32, "skipped": "why"}])])
    latency, memory = plot_latency(table, "name", published), plot_memory(table, "name", published)
    panels = [axis for axis in latency.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels[:2]] == ["32 output tokens", "128 output tokens"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        *("FlexQ", "W6A6", "W8A8, torch", "W8A16, torch", "FP32")
    ]
    assert {axis.get_xlabel() for axis in panels} == {"time (s)"} | ({"paper's GPU (s)"} if len(published) else set())
    if len(published):
        assert [label.get_text() for label in panels[2].get_yticklabels()] == ["FlexQ", "W8A8", "W8A16", "FP16"]
    assert memory.axes[0].get_xlabel() == f"memory, name ({'GB' if len(published) else 'MiB'})"
    widest = max(bar.get_x() + bar.get_width() for bar in memory.axes[0].patches)
    longest = table[table["output_tokens"] == 128]
    assert widest == pytest.approx(
        (longest["weights_mib"] + longest["kv_cache_mib"]).max() * (2**20 / 1e9 if len(published) else 1)
    )
    assert len(panels) == 2 + published["output_tokens"].nunique()
    for figure in (latency, memory):
        figure.savefig(tmp_path / "figure.svg")
