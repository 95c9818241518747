"""Wrong options of the command line: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import os

import pytest


def test_no_command_is_refused(refuse):
    refuse("uncurl: error: the following arguments are required: COMMAND")


def test_an_unknown_command_is_refused(refuse):
    refuse("uncurl: error: argument COMMAND: invalid choice: 'prun' (choose from ", "prun")


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("plan", "--statistics", "s", "--out", "o", "--methd", "x"), "--method"),
        (
            ("calibrate", "--checkpoint", "c", "--task", "t", "--out", "o", "--droples"),
            "--drop",
        ),
        (("prune", "--checkpoint", "c", "--plan", "p", "--out", "o", "--worker=3"), "--worker"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(arguments, nearest, refuse):
    refuse(
        f"uncurl {arguments[0]}: error: an argument must be one that the command takes, got "
        f"...: nearest {nearest}...; see uncurl {arguments[0]} --help.",
        *arguments,
    )


def test_an_option_is_not_abbreviated(refuse):
    sentence = "got --num: nearest"
    refuse(sentence, "plan", "--statistics", "s", "--out", "o", "--num", "2")


def test_one_argument_too_many_is_refused(refuse, world):
    refuse("takes, got again; see", "inspect", world["pretrained"], "again")


def test_a_missing_option_is_named(refuse):
    refuse("arguments are required: --out; see uncurl cache --help", "cache", "--task", "rte")


@pytest.mark.parametrize("value", ["two", "2,", "2;3"])
def test_counts_that_are_no_numbers_are_refused(value, refuse):
    refuse(
        "counts must be whole numbers with commas between them, as 8 or 8,4, got ",
        *("plan", "--statistics", "s", "--out", "o", "--num_experts", value),
    )


@pytest.mark.parametrize("value", ["1", "a/b", "1/"])
def test_a_shard_that_is_no_fraction_is_refused(value, refuse):
    refuse("a shard must be i/n with 0 <= i < n, as 0/4", "sweep", "--out", "o", "--shard", value)


def test_a_shard_out_of_range_is_refused(refuse, world):
    arguments = ("--gin_file", world["study.gin"], "--out", "o", "--shard", "2/2")
    os.symlink(world["model.gin"], "model.gin")
    refuse("--shard i/n must have 0 <= i < n, got 2/2", "sweep", *arguments)
