"""Which layers need 8-bit activations: errors layer by layer, their effect on the model, and the plan that follows (FlexQ §3.1).

The yardstick is the model with 6-bit weights and unrounded activations. Two measures of a layer, both on calibration text:

    one pass     what rounding its input to 6 or 8 bits does to its own output, all layers in one pass: relative error and SQNR,
                 and the KL divergence this predicts. With e the error of a token's outputs and g the gradient of the
                 log-likelihood of a token drawn from the model, KL ≈ ½ E[(g·e)²]: to second order KL is the Fisher metric.
    end to end   the KL divergence and the change of the loss when this layer alone rounds its input, a pass a layer

The plan spends a budget, a share of the multiply-accumulates, on the layers that gain most for their cost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.quant import LayerPrecision, PrecisionPlan, dequantize, quantize_weight
from flexq_core.quant.layers import linear_layers
from flexq_core.quant.quantize import fake_quantize
from flexq_core.runtime import ops
from flexq_core.runtime.convert import quantize_model, replace_linear_layers
from flexq_core.sources.models import locate_model
from flexq_core.studies.accuracy import order_of, perplexity
from flexq_core.studies.parameters import one_of
from flexq_core.studies.scored_model import ScoredModel
from flexq_core.workbook import figures, paths
from flexq_core.workbook.records import Measurement, write_atomically

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

RULE = "flexq"
"""The paper's rule, which the study's own plan is compared with."""
CURVE_POINTS = 5
SCORES = ("measured", "predicted")
"""What a plan chooses layers by: the KL divergence measured end to end, or the one that one pass predicts."""


def multiply_accumulates(model: nn.Module) -> pd.Series:
    """Multiply-accumulates a token of every linear layer of the blocks: layer → N * K."""
    return pd.Series({name: layer.weight.numel() for name, layer in linear_layers(model).items()})


def share_at_eight_bits(plan: PrecisionPlan, macs: pd.Series) -> float:
    """Share of the multiply-accumulates that the plan runs with 8-bit activations, 0 to 1."""
    eight = [layer for layer, bits in plan.layers.items() if bits.activation_bits == 8]
    return float(macs[eight].sum() / macs.sum())


def plan_of(name: str, layers: Iterable[str], eight: Iterable[str]) -> PrecisionPlan:
    """The plan with 6-bit weights whose activations have 8 bits in the layers `eight` and 6 in the others."""
    eight = set(eight)
    return PrecisionPlan(name, {layer: LayerPrecision(6, 8 if layer in eight else 6) for layer in layers})


def greedy_order(gain: pd.Series, macs: pd.Series) -> list[str]:
    """Layers by what 8-bit activations gain for each multiply-accumulate, best first; equals stay in the model's order."""
    return list((gain / macs).sort_values(ascending=False, kind="stable").index)


def greedy_layers(gain: pd.Series, macs: pd.Series, budget: float) -> list[str]:
    """Layers to keep at 8 bits within a budget: in `greedy_order`, leaving out those that no longer fit.

    gain: layer → what 8 bits gain.  macs: layer → multiply-accumulates.  budget: share of all multiply-accumulates, 0 to 1.
    """
    left = budget * macs.sum() * (1 + 1e-9)
    chosen = []
    for layer in greedy_order(gain, macs):
        if macs[layer] <= left:
            chosen.append(layer)
            left -= macs[layer]
    return chosen


def with_six_bit_weights(model: nn.Module) -> nn.Module:
    """A new model whose blocks' weights are rounded to 6 bits in groups and kept as floating-point numbers."""

    def rounded(_: str, linear: nn.Linear) -> nn.Linear:
        # Built without weights of its own: they are replaced at once.
        made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        values = dequantize(quantize_weight(linear.weight.detach(), bits=6), linear.weight.dtype)
        made.weight = nn.Parameter(values, requires_grad=False)
        made.bias = linear.bias
        return made

    return replace_linear_layers(model, rounded).requires_grad_(False)


def layer_errors(model: nn.Module, rows: Tensor, *, seed: int = 0, progress: Callable = iter) -> pd.DataFrame:
    """What rounding each linear layer's input does, for all layers in one forward and backward pass over a text.

    model: from `with_six_bit_weights`.  rows: [W, T] int64 token ids.  seed: draws the tokens whose likelihood is followed.
    Every layer sees the input it has without rounding, so that its error is its own.
    Returns a row a layer and for b in 6, 8: relative_error_ab = ‖W(x_b − x)‖ / ‖W x‖ over all tokens, sqnr_ab_db = −20 log10 of
    it, and predicted_kl_ab_nats, the divergence it should cause (see the head of this file), nats a token.
    """
    layers = linear_layers(model)
    noise, signal, fisher = (pd.DataFrame(0.0, index=list(layers), columns=[6, 8]) for _ in range(3))

    def watch(name: str, layer: nn.Linear) -> Callable:
        def hook(_, arguments, output):
            x = arguments[0].detach()
            signal.loc[name] += F.linear(x, layer.weight).float().square().sum().item()
            errors = {bits: F.linear(fake_quantize(x, bits=bits) - x, layer.weight).float() for bits in (6, 8)}
            for bits, error in errors.items():
                noise.loc[name, bits] += error.square().sum().item()

            def follow(gradient):
                for bits, error in errors.items():
                    fisher.loc[name, bits] += (gradient.float() * error).sum(-1).square().sum().item()

            output.register_hook(follow)

        return hook

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    hooks = [layer.register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    # Weights need no gradient, but what flows through them does: it starts at the embeddings.
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda module, arguments, output: output.detach().requires_grad_()))
    try:
        with torch.enable_grad():
            for row in progress(rows):
                logits = model(input_ids=row[None].to(device), use_cache=False).logits[0, :-1].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                logits.log_softmax(-1).gather(1, drawn).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    relative = (noise / signal.clip(lower=1e-300)) ** 0.5
    found = {}
    for bits in (6, 8):
        found[f"relative_error_a{bits}"] = relative[bits]
        found[f"sqnr_a{bits}_db"] = -20 * np.log10(relative[bits].clip(lower=1e-15))
        found[f"predicted_kl_a{bits}_nats"] = fisher[bits] / 2 / rows[:, 1:].numel()
    return pd.DataFrame(found)


class Predictions:
    """What a model predicts on a text when its layers round their inputs, against what it predicts when none does.

    model: from `with_six_bit_weights`; every call leaves it as it was.  rows: [W, T] int64.
    The unrounded predictions are kept in the model's dtype in this machine's memory: W * T * vocabulary values.
    """

    def __init__(self, model: nn.Module, rows: Tensor, *, batch_size: int = 8) -> None:
        self.model = model
        self.batches = rows.split(batch_size)
        self.tokens = rows[:, 1:].numel()
        self._base = [self._logits(batch).cpu() for batch in self.batches]
        self._base_loss = self._against_base()[1]

    def rounded(self, bits: Mapping[str, int]) -> tuple[float, float]:
        """KL divergence and change of the loss, nats a token, with these layers' inputs rounded (layer → 6 or 8)."""
        hooks = [
            self.model.get_submodule(layer).register_forward_pre_hook(
                lambda module, arguments, bits=bits: (fake_quantize(arguments[0], bits=bits),)
            )
            for layer, bits in bits.items()
        ]
        try:
            kl, loss = self._against_base()
        finally:
            for hook in hooks:
                hook.remove()
        return kl, loss - self._base_loss

    def _against_base(self) -> tuple[float, float]:
        """KL(unrounded predictions ‖ the model as it is now) and its loss, nats a token."""
        kl = loss = 0.0
        for base, batch in zip(self._base, self.batches, strict=True):
            log_now = self._logits(batch).flatten(0, 1).float().log_softmax(-1)
            log_base = base.to(log_now.device).flatten(0, 1).float().log_softmax(-1)
            kl += F.kl_div(log_now, log_base, reduction="sum", log_target=True).item()
            loss += F.nll_loss(log_now, batch[:, 1:].flatten().to(log_now.device), reduction="sum").item()
        return kl / self.tokens, loss / self.tokens

    @torch.no_grad()
    def _logits(self, batch: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]


class SensitivityStudy(ScoredModel):
    """One model's layers, measured one by one and by kind, and the plan that they make.

    run: the workbook run whose records are used.  The parameters are the notebook's.
    Raises, before anything is computed, ValueError (or its kin ModelError, DataError) that says what is accepted.
    """

    def __init__(
        self,
        run: Run,
        *,
        model: str,
        budget: float = 0.0,
        score: str = "measured",
        backend: str = "auto",
        dataset: str = "auto",
        data_dir: str = "",
        calibration_windows: int = 8,
        windows: int = 0,
        window_length: int = 0,
        outliers: float = 0.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        locate_model(model)
        self.backend = ops.resolve_backend(backend, run.device)
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is {budget}; accepted: 0 (as much as the paper's rule takes) to 1")
        self.score = one_of(score, SCORES, "score")
        super().__init__(
            run,
            model=model,
            dataset=dataset,
            data_dir=data_dir,
            windows=windows,
            window_length=window_length,
            calibration_windows=calibration_windows,
            outliers=outliers,
            batch_size=batch_size,
            seed=seed,
        )
        self.macs = multiply_accumulates(self.loaded.model)
        self.rule = PrecisionPlan.from_rule(RULE, self.macs.index)
        self.budget = budget or share_at_eight_bits(self.rule, self.macs)

    @cached_property
    def rounded_model(self) -> nn.Module:
        """The yardstick: 6-bit weights, unrounded activations."""
        return with_six_bit_weights(self.model)

    @cached_property
    def predictions(self) -> Predictions:
        """What it predicts on the calibration text."""
        return Predictions(self.rounded_model, self.calibration, batch_size=self.batch_size)

    def layers(self) -> pd.DataFrame:
        """Measure every layer: one row each, in the model's order.

        Columns: layer, kind (the last part of its name), block, macs, those of `layer_errors`, and kl_nats and
        loss_change_nats, the effect of this layer alone at 6 bits.
        """
        one_pass = self._one_pass()
        rows = []
        for layer in self.run.progress(self.macs.index, desc="layers", total=len(self.macs)):
            effect = self._effect(layer, {layer: 6})
            rows.append({"layer": layer, **_place(layer), "macs": self.macs[layer], **one_pass[layer], **effect})
        return pd.DataFrame(rows)

    def kinds(self) -> pd.DataFrame:
        """End-to-end effect of all layers of a kind at 6 bits: kind, share_of_macs, kl_nats, loss_change_nats."""
        kinds = pd.Series({layer: _place(layer)["kind"] for layer in self.macs.index})
        rows = []
        for kind in kinds.unique():
            members = list(kinds.index[kinds == kind])
            share = self.macs[members].sum() / self.macs.sum()
            rows.append(
                {"kind": kind, "share_of_macs": share, **self._effect(f"every {kind}", dict.fromkeys(members, 6))}
            )
        return pd.DataFrame(rows)

    def gain(self, layers: pd.DataFrame) -> pd.Series:
        """What 8-bit activations gain in each layer, by the score that was asked for: layer → nats a token."""
        table = layers.set_index("layer")
        return table["kl_nats"] if self.score == "measured" else table["predicted_kl_a6_nats"]

    def plan(self, layers: pd.DataFrame) -> PrecisionPlan:
        """The plan for the budget: the greedy choice or the paper's rule, whichever diverges less on the calibration text.

        The greedy choice takes effects for additive; where the rule is within the budget, the calibration text has the last
        word, so that the plan does not cost more than the rule there.
        """
        plans = [plan_of("greedy", self.macs.index, greedy_layers(self.gain(layers), self.macs, self.budget))]
        if share_at_eight_bits(self.rule, self.macs) <= self.budget * (1 + 1e-9):
            plans.append(self.rule)
        costs = [
            self._effect(f"plan: {plan.name}", {layer: bits.activation_bits for layer, bits in plan.layers.items()})[
                "kl_nats"
            ]
            for plan in plans
        ]
        best = plans[costs.index(min(costs))]
        return PrecisionPlan(f"sensitivity-{self.budget:.3g}", best.layers)

    def save(self, plan: PrecisionPlan) -> Path:
        """Write the plan to outputs/plans/, where `-p plan <file>` of 02_accuracy finds it; returns its path."""
        path = paths.plan_file(self.run.parameters)
        write_atomically(path, plan.to_json())
        return path

    def curve(self, layers: pd.DataFrame, plan: PrecisionPlan) -> pd.DataFrame:
        """Perplexity of the scored text against the share of multiply-accumulates at 8 bits.

        Returns rows of {name, share, perplexity, loss_nats/<block>}: `greedy` from none at 8 bits to all, each point adding
        layers to the one before; the paper's rule; and the plan.
        """
        order = greedy_order(self.gain(layers), self.macs)
        reached = self.macs[order].cumsum() / self.macs.sum()
        cases = []
        for target in np.linspace(0, 1, CURVE_POINTS):
            eight = list(reached.index[reached <= target + 1e-9])
            cases.append(("greedy", plan_of("greedy", self.macs.index, eight)))
        cases += [("rule", self.rule), ("plan", plan)]
        rows = []
        for name, each in self.run.progress(cases, desc="plans", total=len(cases)):
            share = share_at_eight_bits(each, self.macs)
            rows.append({"name": name, "share": share, **self._perplexity(name, each)})
        return pd.DataFrame(rows).drop_duplicates(["name", "share"])

    def correlations(self, layers: pd.DataFrame) -> dict[str, float]:
        """Spearman's rank correlation of each one-pass measure with the KL divergence of the layers, put on record."""
        measured = {
            f"rank_correlation/{column}": Measurement(rank_correlation(layers[column], layers["kl_nats"]), "1")
            for column in ("predicted_kl_a6_nats", "relative_error_a6")
        }
        found = self._once("one pass against end to end", self.model_inputs | self.calibration_inputs, lambda: measured)
        return {metric.split("/")[1]: value for metric, value in found.items()}

    def _one_pass(self) -> dict[str, dict[str, float]]:
        def measured() -> dict[str, Measurement]:
            table = layer_errors(
                self.rounded_model,
                self.calibration,
                seed=self.seed,
                progress=lambda rows: self.run.progress(rows, desc="one pass", total=len(rows)),
            )
            return {
                f"{metric}/{layer}": Measurement(value, {"db": "dB", "nats": "nat"}.get(metric.rsplit("_", 1)[-1], "1"))
                for metric, column in table.items()
                for layer, value in column.items()
            }

        found: dict[str, dict[str, float]] = {}
        for name, value in self._once("one pass", self.model_inputs | self.calibration_inputs, measured).items():
            metric, layer = name.split("/", 1)
            found.setdefault(layer, {})[metric] = value
        return found

    def _effect(self, name: str, bits: Mapping[str, int]) -> dict[str, float]:
        def measured() -> dict[str, Measurement]:
            kl, change = self.predictions.rounded(bits)
            return {"kl_nats": Measurement(kl, "nat"), "loss_change_nats": Measurement(change, "nat")}

        inputs = self.model_inputs | self.calibration_inputs | {"activation_bits": _digest(sorted(bits.items()))}
        return self._once(f"rounded: {name}", inputs, measured)

    def _perplexity(self, name: str, plan: PrecisionPlan) -> dict[str, float]:
        def measured() -> dict[str, Measurement]:
            model = quantize_model(self.model, plan, backend=self.backend)
            return perplexity(model, self.rows, batch_size=self.batch_size).measurements()

        eight = [layer for layer, bits in plan.layers.items() if bits.activation_bits == 8]
        inputs = {
            **self.model_inputs,
            **self.text_inputs,
            "eight_bits": _digest(eight),
            "share": share_at_eight_bits(plan, self.macs),
            "backend": self.backend,
        }
        return self._once(f"curve: {name}", inputs, measured)

    def _once(self, method: str, parameters: Mapping[str, Any], compute) -> dict[str, float]:
        records = self.run.records.once(
            model=self.loaded.name, method=method, parameters=parameters, seed=self.seed, compute=compute
        )
        return {metric: record.value for metric, record in records.items()}


def rank_correlation(first: pd.Series, second: pd.Series) -> float:
    """Spearman's rank correlation of two measures of the same layers."""
    return float(first.rank().corr(second.rank()))


def _place(layer: str) -> dict[str, Any]:
    """model.layers.3.mlp.up_proj → its block, 3, and its kind, up_proj."""
    parts = layer.split(".")
    return {"kind": parts[-1], "block": next(int(part) for part in reversed(parts) if part.isdigit())}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def plot_heat(layers: pd.DataFrame, column: str, label: str) -> Figure:
    """A measure of every layer as a map: kinds down, blocks across, on a logarithmic scale."""
    grid = layers.pivot(index="kind", columns="block", values=column).loc[layers["kind"].unique()]
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 0.9 + 0.27 * len(grid)))
    image = axis.imshow(
        grid, norm=LogNorm(max(grid.min().min(), 1e-12), grid.max().max()), aspect="auto", cmap="cividis"
    )
    figure.colorbar(image, label=label)
    axis.set_yticks(range(len(grid)), grid.index)
    axis.set_xticks(range(0, grid.shape[1], max(1, grid.shape[1] // 8)))
    axis.set_xlabel("block")
    axis.grid(False)
    return figure


def plot_prediction(layers: pd.DataFrame, correlations: Mapping[str, float]) -> Figure:
    """One pass against end to end: the predicted and the measured divergence of every layer, and the plain error beside."""
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=figures.FULL_PAGE)
    titles = {
        "predicted_kl_a6_nats": "divergence predicted in one pass (nat)",
        "relative_error_a6": "relative output error",
    }
    for axis, (column, title) in zip(panels, titles.items(), strict=True):
        for kind, colour, marker in zip(
            layers["kind"].unique(), itertools.cycle((*figures.SEQUENCE, figures.INK)), "osD^vPX*<>", strict=False
        ):
            mine = layers[layers["kind"] == kind]
            axis.plot(mine[column], mine["kl_nats"], marker, color=colour, markersize=4, linestyle="none", label=kind)
        axis.set(xscale="log", yscale="log", xlabel=title, title=f"rank correlation {correlations[column]:.3f}")
        axis.xaxis.set_minor_formatter(NullFormatter())  # of less than a decade each tick would be labelled
        low, high = axis.get_xlim()
        if math.log10(high / low) < 2.5:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
    limits = panels[0].get_xlim()
    panels[0].plot(limits, limits, color=figures.NEUTRAL, linewidth=1, zorder=0)
    panels[0].set(ylabel="divergence, this layer at 6 bits (nat)")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_kinds(kinds: pd.DataFrame) -> Figure:
    """Divergence when all layers of a kind are at 6 bits."""
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 0.8 + 0.27 * len(kinds)))
    bars = axis.barh(kinds["kind"], kinds["kl_nats"], color=figures.MAIN)
    labels = [
        f"{kl:.2g} nat, {share:.0%} of MACs" for kl, share in zip(kinds["kl_nats"], kinds["share_of_macs"], strict=True)
    ]
    axis.bar_label(bars, labels, padding=3, fontsize=8)
    axis.set(
        xlabel="divergence, every layer of the kind at 6 bits (nat a token)", xlim=(0, 1.75 * kinds["kl_nats"].max())
    )
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    return figure


def plot_curve(curve: pd.DataFrame, dataset: str) -> Figure:
    """Perplexity against the share of multiply-accumulates with 8-bit activations: greedy, the paper's rule, the plan."""
    figure, axis = plt.subplots()
    greedy = curve[curve["name"] == "greedy"]
    axis.plot(
        100 * greedy["share"],
        greedy["perplexity"],
        "o-",
        color=figures.MAIN,
        markersize=4,
        label="most sensitive first",
    )
    for name, marker, label in (("rule", "s", "the paper's rule"), ("plan", "*", "this study's plan")):
        (row,) = curve[curve["name"] == name].itertuples()
        size, colour = (10, figures.ACCENT) if name == "plan" else (6, figures.INK)
        axis.plot(100 * row.share, row.perplexity, marker, color=colour, markersize=size, label=label)
    axis.set(xlabel="multiply-accumulates with 8-bit activations (%)", ylabel=f"perplexity on {dataset}")
    axis.legend()
    return figure


CLEAR_PERCENT = 1.0
"""How much lower than the rule's the plan's perplexity must be to be called clearly lower, in percent."""
STRONG_CORRELATION = 0.9


def claims(curve: pd.DataFrame, correlations: Mapping[str, float], *, outliers: float) -> list[tuple[str, bool, str]]:
    """What this study claims, as (claim, whether it holds, the numbers)."""
    steps = curve[curve["name"] == "greedy"].drop(columns=["name", "share"]).to_dict("records")
    falls, steps_text = order_of(steps)
    at = curve[curve["name"] != "greedy"].set_index("name")
    no_worse = order_of([at.loc["rule"].drop("share").to_dict(), at.loc["plan"].drop("share").to_dict()])[0]
    at = at["perplexity"]
    better = 100 * (1 - at["plan"] / at["rule"])
    correlation = correlations["predicted_kl_a6_nats"]
    found = [
        (
            f"one pass predicts the order of the layers (rank correlation above {STRONG_CORRELATION})",
            correlation > STRONG_CORRELATION,
            f"{correlation:.3f}; by relative error alone {correlations['relative_error_a6']:.3f}",
        ),
        (
            "perplexity rises with no layer group kept at 8 bits, down to W6A8's, as far as the text can tell",
            falls,
            steps_text,
        ),
        (
            "the plan costs no more than the paper's rule at the same budget, as far as the text can tell",
            no_worse,
            f"{at['plan']:.3f} against {at['rule']:.3f}, {-better:+.2f}%",
        ),
    ]
    if outliers >= 16:
        text = f"with outliers, it is more than {CLEAR_PERCENT:g}% lower in perplexity"
        found.append((text, bool(better > CLEAR_PERCENT), f"{better:.1f}%"))
    return found
