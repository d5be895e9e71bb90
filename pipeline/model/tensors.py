"""Stored tensors and the parameters they belong to: all of the same names and shapes, or none."""

from collections.abc import Mapping

import torch
from torch import nn


def copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into parameters of the same names, all of them.

    Raises KeyError when names are missing or strange, ValueError when a shape differs.
    """
    _check(parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def assign_parameter(
    root: nn.Module, wanted: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Make tensors the frozen parameters of a network on the meta device, neither copied nor cast.

    Raises KeyError when names are missing or strange, ValueError when a shape differs.
    """
    _check(wanted, tensors)
    places: dict[int, tuple[nn.Module, str]] = {}
    for module in root.modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(
                id(parameter), (module, key)
            )  # a tied head is put where the embedding is
    for name, parameter in wanted.items():
        module, key = places[id(parameter)]
        setattr(module, key, nn.Parameter(tensors[name], requires_grad=False))


def _check(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise KeyError(f"{len(odd)} tensors missing or strange, first {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
            )
