"""Every command explains itself, and none takes an option that it would ignore."""

import argparse

import pytest

import data_download
from dopamine_lib import __main__ as command_line
from dopamine_lib.benchmarks import dp
from dopamine_lib.federation.arguments import chosen_options
from dopamine_lib.federation.flower import __main__ as over_flower
from dopamine_lib.federation.mpi import __main__ as over_mpi
from dopamine_lib.federation.remote import __main__ as over_grpc
from dopamine_lib.federation.wires import identities
from dopamine_lib.federation.wires.program import one_setting
from dopamine_lib.inference.network import serving
from dopamine_lib.inference.workers import commands as workers
from dopamine_lib.models.checkpoints import load_model, save_model
from dopamine_lib.models.networks import build


def commands(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The words of every command of a parser, and of every command within one."""
    found = [[]]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [[name, *words] for name, own in action.choices.items() for words in commands(own)]
    return found


def test_help_of_every_command_goes_to_standard_output(capsys):
    programs = [
        (command_line, "python -m dopamine_lib", commands(command_line.parser())),
        (over_grpc, over_grpc.PROGRAM, [*commands(over_grpc._parser()), ["identity"], ["fingerprints"]]),
        (over_flower, over_flower.PROGRAM, [*commands(over_flower._parser()), ["identity"], ["fingerprints"]]),
        (over_mpi, over_mpi.PROGRAM, [[], ["identity"], ["fingerprints"]]),
        (data_download, "", [[]]),
    ]
    asked = [(module.main, program, words) for module, program, every in programs for words in every]
    assert len(asked) > 25
    for main, program, words in asked:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        said = capsys.readouterr()
        assert ended.value.code == 0 and not said.err, words
        assert said.out.startswith(f"usage: {program}"), words


def test_identity_says_what_it_takes(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        over_grpc.main(["identity", "hospital-1"])
    assert ended.value.code == 2 and "required: DIR" in capsys.readouterr().err
    assert over_mpi.main(["identity", "hospital-1", str(tmp_path)]) == 0
    assert identities.fingerprints(tmp_path)["hospital-1"] in capsys.readouterr().out


REPRODUCE = ["reproduce", "--runs", "1", "--out", "no/such/folder"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([*REPRODUCE, "--data-dir", "x"], "--data-dir is x, but synthetic eyes are drawn"),
        ([*REPRODUCE, "--data", "heart", "--size", "64"], "--size is 64, but heart has rows"),
        ([*REPRODUCE, "--accountant", "rdp"], "--accountant is rdp, but it keeps --epsilon"),
        ([*REPRODUCE, "--settings", "C,F", "--epsilon", "3"], "--epsilon is 3.0, but no setting is private (C, F)"),
        ([*REPRODUCE, "--settings", "F", "--noise", "integer"], "--noise is integer, but no setting is private"),
        ([*REPRODUCE, "--settings", "C,CDP", "--aggregation", "bfv"], "--aggregation is bfv, but no setting is fed"),
        ([*REPRODUCE, "--settings", "C", "--least", "3"], "--least is 3, but no setting is federated"),
        ([*REPRODUCE, "--settings", "C", "--dropout", "0.1"], "--dropout is 0.1, but no setting is federated"),
        (["bench", "scaling", "--size", "64"], "--size is 64, but bench scaling has no such choice"),
        (["bench", "dp", "--images", "9"], "--images is 9, but bench dp has no such choice"),
        (["bench", "dp", "--size", "64"], "--size is 64, but is for one network alone"),
        (["bench", "inference", "--device", "cuda"], "--device is cuda, but bench inference has no such choice"),
        (["bench", "inference", "--model", "resnet18"], "--model is resnet18, but is for --images"),
    ],
)  # fmt: skip
def test_an_option_that_would_change_nothing_is_refused(words, said, capsys):
    assert command_line.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and "leave it out" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, begins",
    [
        (["pretrain", "--out"], "dopamine_lib.models.pretraining.make_population"),
        (["bench", "scaling", "--json"], "dopamine_lib.benchmarks.scaling.run"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, begins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(begins, lambda *given, **more: pytest.fail("it has begun"))
    (tmp_path / "a.safetensors").mkdir()
    assert command_line.main([*words, str(tmp_path / "a.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "a.safetensors cannot be written" in error and "name another file" in error and error.count("\n") == 1


def test_what_one_combination_of_a_sweep_has_no_use_for_another_may(tmp_path, refuses):
    file = tmp_path / "sweep.toml"
    given = ["reproduce", "--config", str(file), "--out", "no/such/folder"]
    for settings, runs in ((["C", "FSCDP"], 2), (["C", "F"], 0)):
        file.write_text(f'data = "heart"\nepsilon = 3.0\n[sweep]\nsettings = {settings}\n', encoding="utf-8")
        if runs:
            assert len(command_line._commands(given)) == runs
            continue
        with refuses("--epsilon is 3.0, but no setting is private", "leave it out"):
            command_line._commands(given)


def test_a_run_that_was_begun_with_an_idle_option_goes_on(tmp_path, refuses):
    """Folders of older versions; and what is wrong with a setting is said before what it has no use for."""
    given = command_line.parser().parse_args([*REPRODUCE, "--accountant", "rdp", "--resume"])
    assert chosen_options(given).accountant == "rdp"
    party = argparse.Namespace(setting="C", aggregation="bfv", patience=1.0, resume=False, runs=1)
    with refuses("C is not federated"):
        one_setting(party)


def test_a_network_of_one_s_own_is_not_measured_on_a_gpu(refuses, monkeypatch):
    monkeypatch.setattr(dp, "find_device", lambda name: argparse.Namespace(type="cuda"))
    with refuses("--model is resnet18", "leave it out"):
        dp.run(model="resnet18", device="cuda")


def test_private_inference_refuses_what_it_would_ignore(refuses, tmp_path):
    save_model(
        tmp_path / "cnn.safetensors", build("cnn", 5, None, seed=0), {"architecture": "cnn", "grades": list("abcde")}
    )
    with refuses("--backbone is b.pth", "no head (cnn)", "leave it out"):
        load_model(tmp_path / "cnn.safetensors", "b.pth")
    with refuses("--backbone is b.pth", "resnet18 is a whole network", "leave it out"):
        serving.load("w.pth", backbone="b.pth", model="resnet18")
    given = argparse.Namespace(crypto_provider="none", crypto_provider_certificate="c.crt")
    with refuses("--crypto-provider is none", "leave one out"):
        workers._endpoint(given, "crypto-provider")
