"""Policies as a command line names them, several at once: `score[:heavy][,flag=value…]`."""

from __future__ import annotations

import argparse

import torch

from h2optimizer.flags import add_cache_flags, attention_backend, h2o_config, plans_in
from h2optimizer.llama import H2OConfig
from h2optimizer.utils.cli import InputError, OneLineParser


def policy_config(policy: str, device: torch.device, given: argparse.Namespace) -> H2OConfig:
    """The settings of one of --policies. Raises InputError.

    Args:
        policy: `score[:heavy][,flag=value…]`, where `heavy` is the value of --num_heavy_hitter_tokens, and flags are
            others of `add_cache_flags`.
        given: the cache flags that hold for every policy that does not set them; with model_name, plans are checked.
    """
    try:
        h2o = h2o_config(parsed(policy, given))
        attention_backend(h2o, device)
    except InputError as error:
        raise InputError(f"--policies {policy}: {error}") from None
    return h2o


def parsed(policy: str, given: argparse.Namespace) -> argparse.Namespace:
    """The cache flags of a policy, over those given for all. Raises InputError."""
    parser = OneLineParser(add_help=False)
    add_cache_flags(parser)
    return parser.parse_args(flags_of(policy), argparse.Namespace(**vars(given)))


def plans_of_policies(policies: list[str]) -> list[str]:
    """The files of head budgets that --policies name. Raises InputError."""
    flags = [parsed(policy, argparse.Namespace()) for policy in policies]
    return plans_in(getattr(of, "head_budgets", None) for of in flags)


def flags_of(policy: str) -> list[str]:
    """A policy as flags of the cache: mass:96,update_interval=1 is --score=mass --num_heavy_hitter_tokens=96 …"""
    name, *others = policy.split(",")
    score, colon, heavy = name.partition(":")
    flags = [f"--score={score}", *(f"--{flag}" for flag in others)]
    return flags + [f"--num_heavy_hitter_tokens={heavy}"] * bool(colon)
