"""`provenn prune`: what it writes, what trains on from there, and what it refuses, with nothing left behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import provenn
from provenn.cli import main
from provenn.core.cost import macs
from provenn.core.errors import UserError
from provenn.inference.prune import methods
from provenn.nn.masks import Masks
from provenn.surgery.pruned import load_masks, load_packed, save_masks

SHORT = {"max_steps": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network of a few steps, small enough to be trained again and again."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    provenn.train("dimap", "digits", recipe=SHORT, overrides={"dim": 8, "depths": [1, 2]}, out=folder)
    return folder


@pytest.fixture(scope="module")
def sparse(run):
    folder = run.parent / "pruned"
    assert main(["prune", str(run), "--method", "dimap", "--ratio", "0.4", "--packed", "csr", "-o", str(folder)]) == 0
    return folder


def zeros_of(folder) -> dict[str, torch.Tensor]:
    return {name: ~mask for name, mask in load_masks(folder / "masks.safetensors").kept.items()}


def test_weights_masks_report_and_picture_belong_together(run, sparse):
    names = {file.name for file in sparse.iterdir()}
    assert names == {"weights.safetensors", "masks.safetensors", "csr.safetensors", "pruning.json", "kept.png"}
    before, after = load_file(run / "weights.safetensors"), load_file(sparse / "weights.safetensors")
    removed = zeros_of(sparse)
    for name, value in after.items():
        expected = before[name].masked_fill(removed[name], 0) if name in removed else before[name]
        assert torch.equal(value, expected)
    assert all(torch.equal(after[name], value) for name, value in load_packed(sparse / "csr.safetensors").items())
    report = json.loads((sparse / "pruning.json").read_text())
    assert report["method"] == "dimap" and report["ratio"] == 0.4
    assert {layer["name"]: layer["of"] - layer["kept"] for layer in report["layers"]} == {
        name: int(mask.sum()) for name, mask in removed.items()
    }
    assert report["parameters"]["all"] - report["parameters"]["kept"] == sum(int(m.sum()) for m in removed.values())
    assert 0 < report["multiply_adds"]["kept"] < report["multiply_adds"]["all"]


def test_every_verb_takes_the_folder(sparse):
    assert 0 <= provenn.evaluate("dimap", "digits", weights=sparse).as_json()["metrics"]["accuracy"] <= 1
    _, label = provenn.paper("dimap").load(sparse)
    assert label.trained_on["pruned"] == {"method": "dimap", "ratio": 0.4} and label.metrics == {}


TRAININGS = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "momentum": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "average": {"ema": 0.9},
}


@pytest.mark.parametrize("how", TRAININGS)
def test_training_keeps_the_zeros_and_says_so(how, sparse, tmp_path):
    out = tmp_path / "tuned"
    provenn.train("dimap", "digits", weights=sparse, recipe={**SHORT, **TRAININGS[how]}, out=out)
    before, after = load_file(sparse / "weights.safetensors"), load_file(out / "weights.safetensors")
    for name, removed in zeros_of(sparse).items():
        assert not after[name][removed].any() and not torch.equal(after[name], before[name])
    label = provenn.paper("dimap").load(out)[1]
    assert label.trained_on["pruned"]["ratio"] == 0.4 and "--weights" in label.trained_on["command"]
    assert zeros_of(out).keys() == zeros_of(sparse).keys()  # it may be tuned again


def test_a_training_that_is_resumed_keeps_them_too(sparse, tmp_path):
    out = tmp_path / "tuned"
    common = {"weights": sparse, "out": out}
    provenn.train("dimap", "digits", recipe={"epochs": 1, "batch_size": 256}, **common)
    with pytest.raises(UserError, match="began from pruned weights: give the same --weights with --resume"):
        provenn.train("dimap", "digits", recipe={"epochs": 2, "batch_size": 256}, out=out, resume=True)
    provenn.train("dimap", "digits", recipe={"epochs": 2, "batch_size": 256}, resume=True, **common)
    after = load_file(out / "weights.safetensors")
    assert not any(after[name][removed].any() for name, removed in zeros_of(sparse).items())


def test_pruned_weights_without_their_masks_are_refused(sparse, tmp_path):
    shutil.copy(sparse / "weights.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"was pruned, and .*masks\.safetensors is not there"):
        provenn.train("dimap", "digits", weights=tmp_path, recipe=SHORT, out=tmp_path / "out")
    wrong = load_file(sparse / "masks.safetensors")
    save_file(wrong, tmp_path / "masks.safetensors", {"masks": json.dumps({"x.weight": {"shape": [1], "group": ""}})})
    with pytest.raises(UserError, match="holds no masks, or is damaged"):
        provenn.train("dimap", "digits", weights=tmp_path, recipe=SHORT, out=tmp_path / "out")
    with pytest.raises(UserError, match="strategy fsdp replaces the weights"):
        provenn.train("dimap", "digits", weights=sparse, recipe=SHORT, strategy="fsdp", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_of_another_pruning_are_refused(sparse, tmp_path):
    shutil.copy(sparse / "weights.safetensors", tmp_path)
    masks = load_masks(sparse / "masks.safetensors")
    first = next(iter(masks.kept))
    file = tmp_path / "masks.safetensors"
    save_masks(Masks({**masks.kept, first: ~masks.kept[first]}, masks.groups), file)
    with pytest.raises(UserError, match=f"is of another pruning than the weights beside it: it has zeros in {first}"):
        provenn.train("dimap", "digits", weights=tmp_path, recipe=SHORT, out=tmp_path / "out")
    with pytest.raises(UserError, match="is of another pruning"):
        provenn.prune(tmp_path, method="dimap", ratio=0.5, out=tmp_path / "out")
    save_masks(Masks({"head.other": masks.kept[first]}, {"head.other": ""}), file)
    with pytest.raises(UserError, match=r"is not of the weights beside it: .* no parameter head\.other"):
        provenn.train("dimap", "digits", weights=tmp_path, recipe=SHORT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pruned_weights_on_data_of_other_classes_say_what_to_do(sparse, tmp_path):
    with pytest.raises(UserError, match="tune unpruned weights on this data with --two-steps, and prune what"):
        provenn.train("dimap", "patches", weights=sparse, recipe=SHORT, out=tmp_path / "other")


def test_training_starts_from_dense_weights_as_well(run, tmp_path):
    out = tmp_path / "more"
    provenn.train("dimap", "digits", weights=run, recipe={**SHORT, "lr": 1e-30}, out=out)
    before, after = load_file(run / "weights.safetensors"), load_file(out / "weights.safetensors")
    assert all(torch.allclose(before[name], value) for name, value in after.items())
    assert not (out / "masks.safetensors").exists()
    with pytest.raises(UserError, match="num_classes = 10, and patches asks for 16: start from weights of such data"):
        provenn.train("dimap", "patches", weights=run, recipe=SHORT, out=tmp_path / "other")
    with pytest.raises(UserError, match="holds weights of dimap, not of eca_net"):
        provenn.train("eca_net", "digits", weights=run, recipe=SHORT, out=tmp_path / "other")


@pytest.mark.parametrize("kind", ["Swin", "ViT", "ConvNext"])
def test_folders_of_transformers_are_pruned_and_load_again(kind, tmp_path):
    t = pytest.importorskip("transformers")
    sizes = {
        "Swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": 4},
        "ViT": {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        "ConvNext": {"image_size": 32, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
    }[kind]
    model = getattr(t, f"{kind}ForImageClassification")(getattr(t, f"{kind}Config")(**sizes, num_labels=3))
    model.save_pretrained(tmp_path / "whole")
    folder, summary = provenn.prune(tmp_path / "whole", tmp_path / "pruned", method="dimap", ratio={"mlp": 0.5})
    again = type(model).from_pretrained(folder).state_dict()
    masks = load_masks(folder / "masks.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value.where(masks.kept.get(name, torch.tensor(True)), torch.tensor(0.0)))
    assert summary.groups()["mlp"][0] * 2 == summary.groups()["mlp"][1] and summary.macs_kept < summary.macs


def test_a_file_without_a_label_needs_its_preset_and_must_fit_it(tmp_path):
    torch.save({"model": {"wrong": torch.zeros(1)}}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="names no preset: say with --preset whose weights these are"):
        provenn.prune(tmp_path / "wrong.pth", tmp_path / "out", method="dimap", ratio=0.5)
    with pytest.raises(UserError, match="expected a state dict of a Swin"):
        provenn.prune(tmp_path / "wrong.pth", tmp_path / "out", method="dimap", ratio=0.5, preset="swin_t")
    assert not (tmp_path / "out").exists()


def test_a_paper_stands_for_the_first_of_its_weights(tmp_path):
    folders = [tmp_path / name for name in ("dimap", "swin_digits")]
    for folder in folders:
        provenn.prune(folder.name, folder, method="dimap", ratio=0.5)
    assert len({(folder / "masks.safetensors").read_bytes() for folder in folders}) == 1


def test_methods_are_read_without_torch_and_resolve():
    for card, way in methods().values():
        assert callable(card.resolve(way.masks)) and way.summary


@pytest.mark.parametrize(
    "words, says",
    [
        (["nothing", "--ratio", "0.3"], "no paper, preset, file or folder is called 'nothing'"),
        (["long_context_bench", "--ratio", "0.3"], "no weights come with long_context_bench"),
        (["swin_t", "--ratio", "0.3"], "no weights of swin_t ship: give a file"),
        (["RUN", "--ratio", "1"], "--ratio must be at least 0 and below 1, the share that goes, got '1'"),
        (["RUN", "--ratio", "-0.1"], "at least 0 and below 1"),
        (["RUN", "--ratio", "nan"], "at least 0 and below 1"),
        (["RUN", "--ratio", "qkv=0.2,qkv=0.3"], "groups once each"),
        (["RUN", "--ratio", "0.2,0.3"], "groups once each"),
        (["RUN", "--ratio", "ffn=0.3"], "ratio names ffn, and the modules are qkv, proj, mlp"),
        (["RUN", "--ratio", "0.3", "--set", "grouping=block"], "grouping must be one of modules, model, layer"),
        (["RUN", "--ratio", "0.3", "--set", "group=layer"], "dimap takes no option 'group', did you mean 'grouping'?"),
        (["RUN", "--ratio", "0.3", "--set", 'modules={"ffn":"*.ffn"}'], "no layer of this Enlarged matches ffn: *.ffn"),
        (["RUN", "--ratio", "0.3", "--packed", "coo"], "packed must be one of mask, csr, got 'coo'"),
        (["RUN", "--ratio", "0.3", "--preset", "swin_t"], "holds weights of swin_digits, not of swin_t"),
        (["RUN", "--ratio", "abc"], "at least 0 and below 1, the share that goes, got 'abc'"),
        (["RUN", "--ratio", "0.3", "--set", "seed=abc"], "seed: Input should be a valid integer"),
        (["RUN", "--ratio", "0.3", "--set", "seed=1.5"], "seed: Input should be a valid integer"),
        (["RUN", "--ratio", "0.3", "--set", "modules=5"], "modules: Input should be a valid"),
        (["RUN", "--ratio", "0.3", "--set", "modules=[1]"], "modules: Input should be a valid"),
        (["RUN", "--ratio", "0.3", "--set", 'modules={"mlp":5}'], "modules: Input should be a valid string"),
        (["RUN", "--ratio", "0.3", "--set", "modules={}"], "modules is empty: give a value, or leave it out"),
        (["RUN/run.json", "--ratio", "0.3"], "run.json: it is no torch checkpoint, or damaged"),
        (["image.png", "--ratio", "0.3"], "image.png: it is no torch checkpoint, or damaged"),
        (["nothing.d", "--ratio", "0.3"], "nothing.d holds no weights.safetensors and no config.json"),
        (["masks.safetensors", "--ratio", "0.3"], "is a part of a pruned model: give its folder, or the weights in it"),
        (["RUN", "--ratio", "0.3", "--method", "dimapp"], "is called 'dimapp', did you mean 'dimap'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(words, says, run, sparse, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(sparse / "kept.png", "image.png")
    shutil.copy(sparse / "masks.safetensors", ".")
    (tmp_path / "nothing.d").mkdir()
    words = [word.replace("RUN", str(run)) for word in words]
    words += [] if "--method" in words else ["--method", "dimap"]
    out = tmp_path / "out"
    assert main(["prune", *words, "-o", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], lines
    assert not out.exists()


def test_a_folder_that_is_not_empty_is_left_as_it_is(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["prune", str(run), "--method", "dimap", "--ratio", "0.3", "-o", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_inside_the_models_own_and_a_file_in_its_place(sparse, tmp_path, capsys):
    whole = shutil.copytree(sparse, tmp_path / "whole")
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert main(["prune", str(whole), "--method", "dimap", "--ratio", "0.5", "-o", str(whole / "more")]) == 0
    assert {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()} == before
    assert main(["prune", str(whole), "--method", "dimap", "--ratio", "0.5", "-o", str(whole / "kept.png")]) == 2
    assert "kept.png is a file; name a new folder" in capsys.readouterr().err
    assert (whole / "kept.png").read_bytes() == before["kept.png"]


def test_a_ratio_of_zero_keeps_all_and_options_reach_the_method(run, tmp_path):
    folder, summary = provenn.prune(run, tmp_path / "all", method="dimap", ratio=0)
    assert summary.kept == summary.parameters and not any(removed.any() for removed in zeros_of(folder).values())
    kinds = {}
    for seed in (0, 1):
        options = {"metric": "random", "seed": seed, "modules": {"first": "*.mlp.0"}}
        folder, _ = provenn.prune(run, tmp_path / str(seed), method="dimap", ratio={"first": 0.5}, overrides=options)
        kinds[seed] = zeros_of(folder)
        report = json.loads((folder / "pruning.json").read_text())
        assert (report["ratio"], report["options"]) == ({"first": 0.5}, options)
    assert kinds[0].keys() == kinds[1].keys() and all(".mlp.0" in name for name in kinds[0])
    assert all(not torch.equal(removed, kinds[1][name]) for name, removed in kinds[0].items())


def test_a_second_pruning_of_other_layers_lists_all_along_the_model(run, tmp_path):
    once, _ = provenn.prune(run, tmp_path / "once", method="dimap", ratio=0.5, overrides={"modules": {"a": "*.qkv"}})
    options = {"modules": {"b": "*.mlp.0"}}
    twice, summary = provenn.prune(once, tmp_path / "twice", method="dimap", ratio=0.5, overrides=options)
    names = [layer.name for layer in summary.layers]
    assert [name.split(".")[-2] for name in names] == ["qkv", "0"] * 3
    assert names == [layer["name"] for layer in json.loads((twice / "pruning.json").read_text())["layers"]]


@pytest.mark.parametrize("options", [{}, {"metric": "random", "grouping": "layer"}, {"metric": "magnitude"}])
@pytest.mark.parametrize("ratio", [0.6, 0.1, {"mlp": 0.5}])
def test_a_second_pruning_keeps_the_zeros_of_the_first(ratio, options, sparse, tmp_path):
    folder, summary = provenn.prune(sparse, tmp_path / "twice", method="dimap", ratio=ratio, overrides=options)
    first, second, state = zeros_of(sparse), zeros_of(folder), load_file(folder / "weights.safetensors")
    assert all(
        not (removed & ~second[name]).any() and not state[name][removed].any() for name, removed in first.items()
    )
    for group, (kept, of) in summary.groups().items():
        asked = max(0.4, ratio.get(group, 0) if isinstance(ratio, dict) else ratio)
        assert of - kept == pytest.approx(asked * of, abs=1 if options.get("grouping") is None else 40)
    said = provenn.paper("dimap").load(folder)[1].trained_on["pruned"]
    assert said["before"] == {"method": "dimap", "ratio": 0.4} and said["ratio"] == ratio


def test_a_second_pruning_of_a_folder_of_transformers_keeps_the_zeros(tmp_path):
    t = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    t.ViTForImageClassification(t.ViTConfig(**sizes)).save_pretrained(tmp_path / "whole")
    once, _ = provenn.prune(tmp_path / "whole", tmp_path / "once", method="dimap", ratio=0.5)
    twice, _ = provenn.prune(once, tmp_path / "twice", method="dimap", ratio={"qkv": 0.7})
    second, state = zeros_of(twice), t.ViTForImageClassification.from_pretrained(twice).state_dict()
    for name, removed in zeros_of(once).items():
        assert not (removed & ~second[name]).any() and not state[name][removed].any()


def test_weights_that_grew_back_go_before_a_second_pruning_counts(tmp_path):
    t = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    t.ViTForImageClassification(t.ViTConfig(**sizes)).save_pretrained(tmp_path / "whole")
    once, _ = provenn.prune(tmp_path / "whole", tmp_path / "once", method="dimap", ratio=0.5)
    model = t.ViTForImageClassification.from_pretrained(once)
    torch.manual_seed(0)
    for name in zeros_of(once):
        torch.nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(once)  # tuned by what knows of no masks
    _, summary = provenn.prune(once, tmp_path / "twice", method="dimap", ratio=0.5)
    assert all(2 * kept == of for kept, of in summary.groups().values())


def test_links_are_followed_to_the_masks_and_never_written_through(sparse, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(sparse / "weights.safetensors")
    folder, _ = provenn.prune(tmp_path / "link.safetensors", tmp_path / "twice", method="dimap", ratio=0.1)
    assert all(not (removed & ~zeros_of(folder)[name]).any() for name, removed in zeros_of(sparse).items())
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="name a new folder"):
        provenn.prune(sparse, tmp_path / "nowhere", method="dimap", ratio=0.5)
    assert not (tmp_path / "gone").exists()


def test_multiply_adds_are_counted_of_pictures_that_are_not_square_too(tmp_path):
    folder, summary = provenn.prune("cnl_regions", tmp_path / "out", method="dimap", ratio=0.5)
    report = json.loads((folder / "pruning.json").read_text())["multiply_adds"]
    model, label = provenn.paper("little_attention").load(folder)
    assert label.meta["size"] == [64, 32]
    image = torch.zeros(1, 3, 64, 32)
    assert report["all"] == summary.macs == macs(lambda: model(image))
    assert 0 < report["kept"] <= report["all"]
