"""Refuse runs whose settings do not go together, before any work."""

import torch

from ...kernels.backend import choose, has_fp8
from ..config import RunConfig, SAEConfig
from ..errors import UserError
from ..registry import reads
from ..stream import ActivationStream


def check_runs(stream: ActivationStream, dictionaries: dict[str, RunConfig]) -> None:
    """Raise UserError for runs that do not fit the stream or each other."""
    first_config = next(iter(dictionaries.values())).train
    for name, run in dictionaries.items():
        prefix = f"{name}: " if name else ""
        widths = stream.source.widths
        for key in ("hook", "target", "second"):
            if (hook := getattr(run.stream, key)) not in (None, *widths):
                raise UserError(f"{prefix}stream.{key}: {hook} is not allowed; the stream has {', '.join(widths)}")
        sae_widths = {"d_in": run.sae.d_in} | ({} if run.sae.d_out is None else {"d_out": run.sae.d_out})
        if len(sae_widths) != len(run.stream.hooks):
            raise UserError(
                f"{prefix}sae.d_out: {run.sae.d_out} is not allowed; "
                "a transcoder has both sae.d_out and stream.target, others neither"
            )
        for (field_name, width), hook in zip(sae_widths.items(), run.stream.hooks, strict=True):
            if width != widths[hook]:
                raise UserError(
                    f"{prefix}sae.{field_name}: {width} is not allowed; {hook} of {stream.name} has width {widths[hook]}"
                )
        if 2 * run.train.batch > stream.buffer_tokens:
            raise UserError(
                f"{prefix}train.batch: {run.train.batch} is not allowed; it must be at most half of "
                f"stream.buffer_tokens ({stream.buffer_tokens})"
            )
        for shared_field in ("batch", "checkpoint_every_steps", "log"):
            if getattr(run.train, shared_field) != getattr(first_config, shared_field):
                raise UserError(
                    f"{prefix}train.{shared_field}: {getattr(run.train, shared_field)} is not allowed; it is "
                    f"{getattr(first_config, shared_field)} for all dictionaries of a stream"
                )
        stream.check_mask(run.sae.mask)
        if run.train.fp8:
            check_fp8(run.sae, stream.source.device, prefix)
        _check_parts(prefix, run, stream, widths)
        if (size := stream.ranks.size) > 1:
            if run.sae.d_sae % size:
                raise UserError(f"{prefix}sae.d_sae: {run.sae.d_sae} is not allowed; {size} processes must divide it")
            if run.train.accumulate > 1 or run.train.resample_every_steps is not None:
                field_name = "accumulate" if run.train.accumulate > 1 else "resample_every_steps"
                raise UserError(
                    f"{prefix}train.{field_name}: {getattr(run.train, field_name)} is not allowed; "
                    f"there are {size} processes"
                )


def check_fp8(sae: SAEConfig, device: torch.device, prefix: str = "") -> None:
    """Refuse `train.fp8` unless the fused step of a TopK dictionary runs on the device, in e4m3."""
    is_fused = choose("train_step", torch.empty(0, device=device)) == "triton" and not sae.parts and not sae.mask.blend
    if not (is_fused and sae.activation == "topk" and has_fp8(device)):
        raise UserError(f"{prefix}train.fp8: true is not allowed; it needs sae.activation topk and a GPU from sm_89 on")


def _check_parts(prefix: str, run: RunConfig, stream: ActivationStream, widths: dict[str, int]) -> None:
    """Refuse parts that the stream or the training settings don't support."""
    needs, kinds = reads(run.sae), ", ".join(part_settings["kind"] for part_settings in run.sae.parts)
    if (part_kind := needs.get("rows")) and stream.config.mode != "sequences":
        raise UserError(
            f"{prefix}stream.mode: {stream.config.mode} is not allowed with {part_kind}, which looks along rows of text; "
            "it must be sequences"
        )
    second = run.stream.second
    if (part_kind := needs.get("second")) and second is None:
        raise UserError(
            f"{prefix}stream.second: needed by {part_kind}; give another hook, as in blocks.0.hook_resid_post"
        )
    if second is not None and "second" not in needs:
        raise UserError(f"{prefix}stream.second: {second} is not allowed; no part of the dictionary looks at it")
    if second is not None and widths[second] != run.sae.d_in:
        raise UserError(
            f"{prefix}stream.second: {second} is not allowed; its width is {widths[second]}, and that of "
            f"{run.stream.hook} {run.sae.d_in}"
        )
    if run.train.held_out_rows and (stream.own is not None or stream.ranks.size > 1):
        reason = "several processes" if stream.own is None else "activations without a model"
        raise UserError(f"{prefix}train.held_out_rows: {run.train.held_out_rows} is not allowed with {reason}")
    if kinds and stream.own is not None and not stream.own.has_positions:
        raise UserError(f"{prefix}sae.parts: {kinds} is not allowed; {stream.own.name} has no positions")
    if kinds and run.train.accumulate > 1:
        raise UserError(f"{prefix}train.accumulate: {run.train.accumulate} is not allowed with sae.parts ({kinds})")
    if kinds and stream.ranks.size > 1:
        raise UserError(f"{prefix}sae.parts: {kinds} is not allowed; there are {stream.ranks.size} processes")
