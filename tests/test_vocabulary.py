"""One vocabulary over all programs: a concept has one spelling, whichever program asks for it, and every flag is
explained."""

import importlib
import sys
from pathlib import Path

import pytest

import image_sample
import image_train

ROOT = Path(__file__).resolve().parents[1]

# Concept -> its spelling and the old spellings that are kept as aliases. Positional arguments stay what they are.
VOCABULARY = {
    "folder of data, with training and test set": ("--data_dir", {"--real"}),
    "where to write to": ("--results_path", {"--out", "--output"}),
    "trained model to use": ("--model_path", {"--segmenter", "--model", "--checkpoint"}),
    "share of the slides held out": ("--val_share", {"--held_out"}),
    "share of the data to use": ("--subsample", {"--share"}),
    "steps between validations": ("--val_interval", {"--eval_interval"}),
    "steps of a training": ("--max_steps", {"--steps"}),
    "steps of a sampler": ("--num_steps", {"--sampling_steps"}),
    "items at once": ("--batch_size", {"--batch"}),
    "processes that read": ("--num_workers", {"--workers"}),
    "where to compute": ("--device", {"--gpu"}),
    "what to compute in": ("--precision", {"--dtype"}),
    "randomness": ("--seed", {"--random_state"}),
    "backbone": ("--backbone", {"--network"}),
    "learning rate": ("--lr", {"--learning_rate"}),
}
sys.path.append(str(ROOT / "scripts" / "benchmarks"))  # as it is when one of them is run
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if "def create_argparser" in path.read_text()
]
PARSERS = {
    "image_train": image_train.create_argparser,
    "image_sample": image_sample.create_argparser,
    **{name: importlib.import_module(name).create_argparser for name in SCRIPTS},
}
ACTIONS = [(name, action) for name, make in PARSERS.items() for action in make()._actions if action.dest != "help"]
FLAGS = [(name, action) for name, action in ACTIONS if action.option_strings]


def test_there_are_programs():
    assert {"scripts.evaluate", "scripts.train_segmenter", "scripts.benchmarks.benchmark_training"} <= PARSERS.keys()


@pytest.mark.parametrize("concept", VOCABULARY)
def test_a_concept_has_one_spelling(concept):
    spelling, old = VOCABULARY[concept]
    for name, action in FLAGS:
        for text in old.intersection(action.option_strings):
            assert action.option_strings[0] == spelling, f"{name} has {text}: spell it {spelling}, {text} as an alias"


def test_old_spellings_work_and_say_so():
    old = {text: spelling for spelling, others in VOCABULARY.values() for text in others}
    found = [(name, action, text) for name, action in FLAGS for text in action.option_strings if text in old]
    assert len(found) >= 10
    for name, action, text in found:
        assert f"{text}: deprecated spelling" in " ".join(PARSERS[name]().format_help().split()), f"{name} {text}"
        assert action.option_strings[0] == old[text]


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_is_explained_with_its_true_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken within a word
    parser = PARSERS[name]()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help and action.help.strip(), f"{name}: {action.dest}"
        if action.dest == "help":
            continue
        assert "default" not in action.help, f"{name}: {action.dest} writes by hand what the parser says"
        if action.option_strings and action.default not in (None, "", []):
            shown = " ".join(f"{action.help} (default {action.default})".split())
            assert shown in text, f"{name}: {action.dest}"


def test_a_device_is_chosen_alike():
    devices = {program: action.default for program, action in FLAGS if action.dest == "device"}
    programs = "evaluate extract_features filter_ood segment train_segmenter"
    assert {"image_train", "image_sample", *(f"scripts.{name}" for name in programs.split())} <= devices.keys()
    assert set(devices.values()) == {"auto"}


def test_seeds_and_shares_are_numbers():
    types = {"--seed": int, "--val_share": float, "--batch_size": int, "--num_workers": int}
    for name, action in FLAGS:
        assert action.type in (types.get(action.option_strings[0], action.type),), f"{name}: {action.option_strings}"
