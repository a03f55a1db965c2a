"""The files under configs/: runs and models."""
import json
import re
from pathlib import Path

import pytest

from evaluation.sweep.settings import Prompts, Sweep
from utils.config import REPOSITORY, ConfigError, load_config, load_model_spec
from utils.yaml_files import load_structured
from wan.geometry import VideoGeometry
from wan.kv_cache.policy import build_policy, policy_fields

CONFIGS = REPOSITORY / "configs"
DMD = CONFIGS / "self_forcing_dmd"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in MODELS)
PLAIN, DEEP_SINK, COMPRESSED = {}, {"is_ds_only": True}, {"budget": 16, "recent": 4}


def load(path, **flags):
    return load_config(path, policy_fields=policy_fields(), build_policy=build_policy, **flags)


def check_policy(config):
    """The real policy can be made, and accepts the chunks of the config."""
    fields = dict(config.kv_cache)
    geometry = VideoGeometry(height=96, width=160, fps=16, chunk_frames=config.num_frame_per_block)
    sizes = build_policy(fields.pop("policy"), fields).sizes(geometry)
    if "window_frames" in fields:
        assert sizes.window_tokens == fields["window_frames"] * geometry.frame_tokens
    assert geometry.chunk_frames * geometry.frame_tokens < sizes.window_tokens


def released():
    """Every file of upstream's names with each set of the released flags."""
    for path in sorted(DMD.glob("*.yaml")):
        for flags in (PLAIN, DEEP_SINK, COMPRESSED):
            yield pytest.param(path, flags, id=f"{path.stem}-{'-'.join(flags) or 'plain'}")


@pytest.mark.parametrize("text, words", [
    ("height: ???", "a.yaml:2: height has no value"),
    ("kv_cache:\n  sink_frames: ???", "a.yaml:3: kv_cache.sink_frames has no value"),
    ("kv_cache:", "a.yaml:2: kv_cache=None is not allowed. Allowed: a group"),
    ("kv_cache: {}", "a.yaml:2: kv_cache={} is not allowed. Allowed: a group"),
])
def test_what_is_left_open_never_falls_back_to_the_base(tmp_path, text, words):
    """A value or a group that a file announces and does not give is refused, though its base has one."""
    file = tmp_path / "a.yaml"
    file.write_text(f"extends: {CONFIGS / 'deep_sink.yaml'}\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(file)


@pytest.mark.parametrize("flags, words", [
    ({"overrides": ["height=???"]}, "--set height=???: height has no value"),
    ({"overrides": ["kv_cache=null"]}, "--set kv_cache=null: kv_cache=None is not allowed"),
    ({"overrides": ["model_kwargs={}"]}, "--set model_kwargs={}: model_kwargs={} is not allowed"),
    ({"policy": "deep_sink"}, "--policy deep_sink: is a method, not a cache policy. Use --config_path configs/deep_"),
    ({"policy": "models/tiny"}, "cache policy 'models/tiny' is unknown"),
])
def test_flags_that_say_nothing_are_refused(flags, words):
    """Each would otherwise change nothing, or is meant for --config_path."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(CONFIGS / "deep_sink.yaml", **flags)


@pytest.mark.parametrize("path", [path for path in RUNS if path.parent != DMD], ids=lambda path: path.stem)
def test_our_configs_build_their_policy(path):
    """Each of our files makes a real policy that accepts its chunk, and so does its Deep Sink."""
    check_policy(load(path))
    check_policy(load(path, **DEEP_SINK))


@pytest.mark.parametrize("path, flags", list(released()))
def test_released_commands_work(path, flags):
    """The released configs take --is_ds_only 1 always, and --Budget 16 --Recent 4 where the sinks leave room."""
    sink = int((re.search(r"sink(\d+)", path.stem) or [0, 0])[1])
    if sink + 4 > 16 and not flags.get("is_ds_only"):
        with pytest.raises(ConfigError, match=f"sink_size={sink} .*--is_ds_only 1"):
            load(path, **flags)
        return
    config = load(path, **flags)
    check_policy(config)
    expected = "rolling" if not sink else "sink" if flags.get("is_ds_only") else "participative"
    assert (config.kv_cache["policy"], config.kv_cache.get("sink_frames", 0)) == (expected, sink)


def test_upstream_names_and_ours_agree():
    """Two roads to one config: upstream's file with its flags, and our file of that method."""
    assert load(DMD / "self_forcing_dmd.yaml") == load(CONFIGS / "self_forcing.yaml")
    assert load(DMD / "self_forcing_dmd_sink10.yaml") == load(CONFIGS / "deep_forcing.yaml")
    assert load(DMD / "self_forcing_dmd_sink10.yaml", is_ds_only=1) == load(CONFIGS / "deep_sink.yaml")
    assert load(
        DMD / "self_forcing_dmd.yaml", overrides=["model_kwargs.local_attn_size=-1"],
    ) == load(CONFIGS / "full.yaml")
    assert load(CONFIGS / "framewise.yaml") == load(
        CONFIGS / "deep_forcing.yaml", overrides=["num_frame_per_block=1", "base_model=causal_forcing_framewise"],
    )


@pytest.mark.parametrize("path", RUNS + MODELS, ids=lambda path: path.stem)
def test_every_line_is_explained(path):
    """A reader of a shipped YAML finds a comment on each line."""
    bare = [line for line in path.read_text().splitlines() if line.strip() and "# " not in line]
    assert bare == []


def test_the_real_model_has_its_size():
    """The parameter count that follows from the 1.3B file's shape is that of the released weights."""
    spec = load_model_spec("wan2.1_t2v_1.3b")
    d, f, t = spec.transformer["dim"], spec.transformer["ffn_dim"], spec.transformer["text_dim"]
    freq, patch = spec.transformer["freq_dim"], spec.transformer["in_dim"] * 4
    attention = 4 * (d * d + d) + 2 * d
    block = 2 * attention + 2 * d + (d * f + f) + (f * d + d) + 6 * d
    embeddings = (patch * d + d) + (t * d + d) + (d * d + d) + (freq * d + d) + (d * d + d) + (d * 6 * d + 6 * d)
    head = 2 * d + d * patch + patch
    assert spec.transformer["num_layers"] * block + embeddings + head == 1_418_996_800


def test_a_model_has_one_name_and_one_path():
    """By stem or by path, it is the same model, and it can be saved beside a video."""
    spec = load_model_spec("tiny")
    assert spec == load_model_spec(CONFIGS / "models" / "tiny.yaml")
    saved = json.loads(json.dumps(spec.resolved()))
    assert (saved["name"], saved["transformer"]["patch_size"], saved["vae"]) == ("tiny", [1, 2, 2], str(spec.vae))


@pytest.mark.parametrize("change, message", [
    ("height: 0", "m.yaml:2: height=0 is not allowed. Allowed: a whole number"),
    ("heigth: 8", "m.yaml:2: unknown key heigth. Did you mean height?"),
    ("name: tiny", "unknown key name"),
    ("vae: 3", "m.yaml:2: vae=3 is not allowed. Allowed: a path"),
    ("transformer: {dims: 8}", "unknown key transformer.dims. Did you mean dim?"),
    ("transformer: {dim: 2.5}", "m.yaml:2: transformer.dim=2.5 is not allowed"),
    ("transformer: {patch_size: [2, 2]}",
     r"transformer.patch_size=\[2, 2\] is not allowed. Allowed: three whole numbers"),
    ("transformer: 3", "lacks the group transformer"),
])
def test_bad_model_says_where_and_what(tmp_path, change, message):
    """Models are checked as configs are."""
    path = tmp_path / "m.yaml"
    path.write_text(f"extends: {CONFIGS / 'models/tiny.yaml'}\n{change}\n")
    with pytest.raises(ConfigError, match=message):
        load_model_spec(path)


def test_incomplete_model_lists_what_it_lacks(tmp_path):
    """Every missing key is named at once."""
    path = tmp_path / "m.yaml"
    path.write_text("height: 8\ntransformer:\n  dim: 8\n  num_heads: 1\n")
    with pytest.raises(ConfigError, match="m.yaml:2: lacks transformer.ffn_dim, .*transformer.patch_size. Add"):
        load_model_spec(path)


def test_unknown_model_suggests_its_neighbour():
    """A mistyped name is answered with the nearest."""
    with pytest.raises(ConfigError, match="model='tinny' is unknown. Did you mean tiny?"):
        load_model_spec("tinny")


def test_model_paths_are_of_the_repository_unless_absolute(tmp_path):
    """Weights are found from any working folder; absolute paths and ~ are kept."""
    path = tmp_path / "m.yaml"
    path.write_text(f"extends: {CONFIGS / 'models/tiny.yaml'}\nvae: {tmp_path / 'vae'}\ncheckpoint: ~/x.pt\n")
    spec = load_model_spec(path)
    assert (spec.vae, spec.checkpoint) == (tmp_path / "vae", Path.home() / "x.pt")
    assert spec.tokenizer == REPOSITORY / "weights/tiny/tokenizer"


@pytest.mark.parametrize("text, said", [
    ("model: a: b", "s.yaml:2: not valid YAML: mapping values are not allowed here. Correct it, or put"),
    ("shown: [1", "s.yaml:3: not valid YAML: expected ',' or ']'"),
    ("\tshown: 1", "s.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    ("- 1", "s.yaml:2: not valid YAML: expected <block end>"),
    ("model: *a", "s.yaml:2: not valid YAML: found undefined alias"),
    ("model: ${a", "s.yaml:2: model='${a': "),
    ("model: ${a}", "s.yaml:2: model='${a}' has no value: it names nothing that has one"),
    ("model: ${model}", "s.yaml:2: model='${model}' has no value"), ("model: ???", "s.yaml:2: model has no value, o"),
    ("shown: two", "s.yaml:2: shown='two' is not allowed. Allowed: a whole number."),
    ("shown: true", "s.yaml:2: shown=True is not allowed. Allowed: a whole number."),
    ("use_ema: maybe", "s.yaml:2: use_ema='maybe' is not allowed. Allowed: true or false."),
    ("checkpoint: []", "s.yaml:2: checkpoint=[] is not allowed. Allowed: text, or null."),
    ("prompts:\n  captions: 3", "s.yaml:3: prompts.captions=3 is not allowed. Allowed: a list, in [], each of it a"),
    ("methods: [a]", "s.yaml:2: methods=['a'] is not allowed. Allowed: a group of names, each with a group of"),
    ("tables: {t:\n {columns: []}}", "s.yaml:2: lacks tables.t.title. Add it."),
    ("tables: {t: {title: T, columns: [{metrik: x}]}}", "unknown key tables.t.columns[0].metrik. Did you mean metric?"),
    ("record: {seconds: .nan}", "s.yaml:2: record.seconds=nan is not allowed. Allowed: a number."),
])
def test_a_structured_file_is_refused_with_its_line(tmp_path, text, said):
    """Place, what is there, what is allowed."""
    file = tmp_path / "s.yaml"
    file.write_text(f"seconds: [1]\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_structured(file, Sweep)


@pytest.mark.parametrize("flag, said", [
    ("shown=two", "--set shown=two: shown='two' is not allowed. Allowed: a whole number."),
    ("seconds[0]=5", "--set seconds[0]=5: seconds={'0': 5} cannot take the place of [1]. Give a whole list."),
    ("methods=[1]", "--set methods=[1]: methods=[1] cannot take the place of {}. Give a whole group of keys."),
    ("model=[", "--set model=[: the value cannot be read as YAML: "),
    ("model=${", "--set model=${: the value cannot be read as YAML: "),
    ("shown", "--set shown: write key=value"), ("prompts.cuont=3", "--set prompts.cuont=3: unknown key prompts.cuont."),
])
def test_a_flag_is_refused_by_its_name(tmp_path, flag, said):
    """The file is not to blame."""
    file = tmp_path / "s.yaml"
    file.write_text("seconds: [1]\nmethods: {}\nprompts: {}\nvlm: x\n")
    assert load_structured(file, Sweep, ["shown=7", "seconds=[2]", "model=${vlm}y"]) == Sweep(
        seconds=[2.0], methods={}, prompts=Prompts(), vlm="x", shown=7, model="xy",
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        load_structured(file, Sweep, [flag])


def test_yaml_is_read_in_one_place():
    """No other module imports a YAML reader."""
    code = [path for folder in ("utils", "wan", "pipeline") for path in (REPOSITORY / folder).rglob("*.py")]
    readers = [p.name for p in code if re.search(r"^\s*(import|from) (yaml|omegaconf)\b", p.read_text(), re.MULTILINE)]
    assert readers == ["yaml_files.py"]
