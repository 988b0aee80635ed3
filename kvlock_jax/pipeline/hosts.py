"""Checks that all hosts of a run hand the same values to its programs.

A program on several hosts takes each host's copy of a clip, a mask, a prompt or the noise for the
same array. Copies that differ would be mixed without an error, so they are compared before.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.settings import Settings

_SMALL = 1 << 16  # elements of a parameter whose values are compared


def check_hosts_agree(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    noise: np.ndarray,
    **options: Any,
) -> None:
    """Compares all that enters the programs of a batch over the hosts; each must call it.

    Args:
      model: checkpoint, whose configs, dtypes and layout on devices are compared.
      inputs: clips, masks, prompts and pictures of the edits.
      settings: of each edit.
      noise: of each source.
      options: further values that change the programs, by name.

    Raises:
      InputError: some differ; it names them.
      HostError: another host failed.
    """
    if jax.process_count() == 1:
        return
    parts = {"the model": digest_model(model), "the noise": agreement.digest(np.asarray(noise))}
    parts |= {name: str(value) for name, value in options.items()}
    for number, (edit, own) in enumerate(zip(inputs, settings, strict=True), 1):
        suffix = f" of edit {number}" if len(inputs) > 1 else ""
        named = digest_inputs(edit) | _flat(dataclasses.asdict(own))
        parts |= {f"{name}{suffix}": text for name, text in named.items()}
    agreement.agree("inputs of an edit", parts)


def digest_inputs(inputs: EditInputs) -> dict[str, str]:
    """Checksums of what a user hands over to be edited, by the flag that named it."""
    return {
        "src_video": agreement.digest(inputs.source),
        "src_mask": agreement.digest(inputs.mask),
        "prompt": inputs.prompt,
        "src_ref_images": agreement.digest(*inputs.references),
    }


def digest_model(model: Model) -> str:
    """A checksum of a model: configs, parameters' shapes and dtypes, and the values of small ones.

    Small are parameters of up to 65,536 elements that lie whole on every device: biases, norms and
    modulations, which no two checkpoints have in common.
    """
    networks = model.checkpoint
    parts = [repr(networks.configs), repr(model.mesh and dict(model.mesh.shape))]
    parts += [getattr(networks.transformer.attend, "__name__", ""), str(networks.vae.tiles)]
    values = []
    for name in networks.configs.networks:
        network = nnx.state(getattr(networks, name))
        for path, leaf in jax.tree_util.tree_leaves_with_path(network):
            parts.append(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}")
            if leaf.size <= _SMALL and leaf.is_fully_replicated:
                values.append(np.asarray(leaf.addressable_data(0)))
    return agreement.digest("\n".join(parts).encode(), *values)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted names, as JSON."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, default=str)
    return flat
