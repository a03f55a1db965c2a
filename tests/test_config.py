"""Configs: merging, checks, upstream's keys. The registry of policies is a small one of this file's own."""
import json
import logging
import random
import re
from dataclasses import MISSING, FrozenInstanceError, asdict, dataclass, fields

import pytest
import yaml

from utils.config import REPOSITORY, Config, ConfigError, load_config

CONFIGS = REPOSITORY / "configs"


# --- a registry of our own -------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Window:
    window_frames: int


@dataclass(frozen=True, kw_only=True)
class Sink(Window):
    sink_frames: int
    positions: str = "released"


@dataclass(frozen=True, kw_only=True)
class Participative(Sink):
    budget_frames: int
    recent_frames: int
    votes: str = "both"


FAKE = {"full": Window, "rolling": Window, "sink": Sink, "participative": Participative}
FAKE_FIELDS = {name: {f.name for f in fields(policy)} for name, policy in FAKE.items()}


def fake_policy(name, settings):
    missing = [f.name for f in fields(FAKE[name]) if f.default is MISSING and f.name not in settings]
    if missing:
        raise ValueError(f"kv_cache lacks {', '.join(missing)}")
    if settings["window_frames"] > 100:
        raise ValueError(f"kv_cache.window_frames={settings['window_frames']} is outside 1..100")
    return FAKE[name](**settings)


def load(path, **flags):
    return load_config(path, policy_fields=FAKE_FIELDS, build_policy=fake_policy, **flags)


@pytest.fixture
def write(tmp_path):
    """Write a file of this name and text (or bytes), and return its path."""

    def to_file(text, name="a.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to_file


def group(name, *values):
    """A complete `kv_cache` group from values in the order of its policy's fields; later fields by default."""
    policy = FAKE[name]
    return {"policy": name, **asdict(policy(**dict(zip([f.name for f in fields(policy)], values, strict=False))))}


def own(name, *values):
    """The text of a config with such a group."""
    return yaml.safe_dump({"kv_cache": group(name, *values)})


def legacy(local=None, sink=None, **more):
    """The text of a config in upstream's keys."""
    kwargs = {"local_attn_size": local, "sink_size": sink}
    return yaml.safe_dump({"model_kwargs": {k: v for k, v in kwargs.items() if v is not None}, **more})


# Fields of the fake policies come base class first: window, sink, positions, budget, recent, votes.
PARTICIPATIVE = group("participative", 21, 10, "released", 16, 4)
DEEP_FORCING = own("participative", 21, 10, "released", 16, 4)


# --- merging ---------------------------------------------------------------------------------------------------

def test_an_empty_mapping_is_self_forcing(write):
    """What a file does not say is Self Forcing's: the code's defaults and configs/base.yaml are one."""
    assert load(write("{}")) == load(CONFIGS / "base.yaml")


def test_later_layers_win(write):
    """Base, file, first --set, last --set: the last to say a key has it; what it leaves out stays."""
    write("height: 1\nwidth: 2\nnum_frame_per_block: 4\n", "bases/base.yaml")
    write("extends: bases/base.yaml\nwidth: 20\nnum_frame_per_block: 5\n", "middle.yaml")
    file = write("extends: middle.yaml\nnum_frame_per_block: 6\n")
    assert load(file).num_frame_per_block == 6
    config = load(file, overrides=["num_frame_per_block=8", "num_frame_per_block=7", "context_noise=3"])
    assert (config.height, config.width, config.num_frame_per_block, config.context_noise) == (1, 20, 7, 3)


def test_groups_merge_by_key_unless_the_policy_differs(write):
    """A file refines its base's kv_cache group; naming another policy starts a new group."""
    write(own("participative", 21, 10, "unified", 16, 4), "base.yaml")
    assert load(write("extends: base.yaml\nkv_cache: {sink_frames: 8}")).kv_cache["positions"] == "unified"
    other = write("extends: base.yaml\nkv_cache: {policy: rolling, window_frames: 9}")
    assert load(other).kv_cache == group("rolling", 9)


def test_upstream_shift_is_one_setting(write):
    """model_kwargs.timestep_shift and timestep_shift are one key: the later layer wins, whichever name it uses."""
    write("timestep_shift: 5", "base.yaml")
    file = write("extends: base.yaml\nmodel_kwargs: {timestep_shift: 8}")
    assert load(file).timestep_shift == 8
    assert load(file, overrides=["timestep_shift=3"]).timestep_shift == 3
    assert load(file, overrides=["timestep_shift=3", "model_kwargs.timestep_shift=2.5"]).timestep_shift == 2.5


def test_interpolation_reads_the_merged_config(write):
    """`${key}` takes the value that holds in the end, --set included."""
    assert load(write("height: ${width}\nwidth: 64"), overrides=["width=96"]).height == 96


def test_whole_steps_are_integers(write):
    """1000.0 and 1000 are one step, a row of the schedule; a byte-order mark before the first key is no part of it."""
    config = load(write("\ufeffdenoising_step_list: [1000.0, 500]\nwarp_denoising_step: true"))
    assert [repr(step) for step in config.denoising_step_list] == ["1000", "500"]


def test_config_is_frozen(write):
    """Nothing below can change a setting by accident."""
    config = load(write("{}"))
    with pytest.raises(FrozenInstanceError):
        config.height = 8
    with pytest.raises(TypeError):
        config.kv_cache["window_frames"] = 8


# --- upstream's keys -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, flags, expected", [
    (legacy(21, 0), {}, group("rolling", 21)),
    (legacy(12), {}, group("rolling", 12)),
    (legacy(-1), {}, group("full", 21)),
    (legacy(), {}, group("full", 21)),
    (legacy(-1, num_training_frames=27, image_or_video_shape=[1, 30, 16, 60, 104]), {}, group("full", 27)),
    (legacy(-1, image_or_video_shape=[1, 30, 16, 60, 104]), {}, group("full", 30)),
    (legacy(-1, 3), {}, group("full", 21)),
    (legacy(21, 10), {}, PARTICIPATIVE),
    (legacy(21, 10), {"budget": 18}, group("participative", 21, 10, "released", 18, 4)),
    (legacy(21, 10), {"budget": 18, "recent": 6}, group("participative", 21, 10, "released", 18, 6)),
    (legacy(21, 12), {}, group("participative", 21, 12, "released", 16, 4)),
    (legacy(21, 10), {"is_ds_only": 1}, group("sink", 21, 10)),
    (legacy(21, 14), {"is_ds_only": 1, "budget": 16, "recent": 4}, group("sink", 21, 14)),
    (legacy(21, 14), {"budget": 18}, group("participative", 21, 14, "released", 18, 4)),
    (legacy(21, 0), {"is_ds_only": 1, "budget": 16, "recent": 4}, group("rolling", 21)),
    (legacy(21, 14), {"policy": "rolling"}, group("rolling", 21)),
    (legacy(21, 10), {"overrides": ["model_kwargs.sink_size=12"]}, group("participative", 21, 12, "released", 16, 4)),
    (legacy(21, 0), {"overrides": ["model_kwargs.sink_size=10"]}, PARTICIPATIVE),
    (legacy(21, 14), {"overrides": ["kv_cache.sink_frames=10"]}, PARTICIPATIVE),
    (legacy(21, 14), {"overrides": ["kv_cache.policy=sink", "kv_cache.positions=original"]},
     group("sink", 21, 14, "original")),
])
def test_upstream_keys_choose_the_policy(write, text, flags, expected):
    """Without a kv_cache group, local_attn_size, sink_size and the released flags mean one policy each."""
    assert load(write(text), **flags).kv_cache == expected


@pytest.mark.parametrize("text, flags, expected", [
    (own("participative", 21, 10, "unified", 16, 4), {"is_ds_only": 1}, group("sink", 21, 10, "unified")),
    (own("sink", 21, 3, "original"), {"is_ds_only": 1}, group("sink", 21, 3, "original")),
    (own("rolling", 21), {"is_ds_only": 1}, group("rolling", 21)),
    (DEEP_FORCING, {"budget": 19, "recent": 5}, group("participative", 21, 10, "released", 19, 5)),
    (DEEP_FORCING, {"policy": "full"}, group("full", 21)),
    (own("participative", 21, 10, "unified", 16, 4), {"policy": "sink"}, group("sink", 21, 10, "unified")),
    (own("sink", 21, 10, "original"), {"policy": "participative", "budget": 16, "recent": 4},
     group("participative", 21, 10, "original", 16, 4)),
    (own("rolling", 21), {"policy": "participative", "is_ds_only": 1, "overrides": ["kv_cache.sink_frames=7"]},
     group("sink", 21, 7)),
    (DEEP_FORCING, {"budget": 18, "overrides": ["kv_cache.budget_frames=20"]},
     group("participative", 21, 10, "released", 20, 4)),
    (DEEP_FORCING, {"overrides": ["kv_cache.policy=rolling", "kv_cache.window_frames=9"]}, group("rolling", 9)),
    (own("rolling", 21), {"overrides": ["kv_cache={policy: sink, sink_frames: 3}"]}, group("sink", 21, 3)),
    (own("sink", 21, 10) + legacy(21, 10), {}, group("sink", 21, 10)),
    (own("full", 30) + legacy(-1, 0), {}, group("full", 30)),
])
def test_flags_change_a_kv_cache_group(write, text, flags, expected):
    """--policy, --is_ds_only, --Budget and --Recent, then --set, change the group that the file gives."""
    assert load(write(text), **flags).kv_cache == expected


UPSTREAM = """
generator_ckpt: checkpoints/ode_init.pt
generator_fsdp_wrap_strategy: size
real_name: Wan2.1-T2V-14B
denoising_step_list: [1000, 750, 500, 250]
warp_denoising_step: true
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 3.0
wandb_project: ???
lr: 2.0e-06
beta1: 0.0
ema_weight: 0.99
negative_prompt: '过曝'
image_or_video_shape: [1, 21, 16, 60, 104]
num_training_frames: 21
num_frame_per_block: 3
height: 480
width: 832
model_kwargs:
  timestep_shift: 5.0
  local_attn_size: 21
  sink_size: 10
"""


def test_upstream_file_loads_with_one_notice(write, caplog):
    """Training keys change nothing and are all named, in one line."""
    caplog.set_level(logging.INFO)
    config = load(write(UPSTREAM))
    own_keys = ("denoising", "warp", "timestep_shift", "num_frame_per", "height", "width", "model_kwargs")
    ignored = ", ".join(key for key in yaml.safe_load(UPSTREAM) if not key.startswith(own_keys))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [f"ignored training keys: {ignored}"]
    cache = f"kv_cache={json.dumps(PARTICIPATIVE)}"
    assert config == load(CONFIGS / "base.yaml", overrides=["height=480", "width=832", cache])


def test_a_key_that_chose_the_window_is_not_called_ignored(write, caplog):
    """With local_attn_size -1 the training clip's length is used, so the notice leaves it out."""
    caplog.set_level(logging.INFO)
    load(write(legacy(-1, num_training_frames=27, lr=1)))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == ["ignored training keys: lr"]


# --- what cannot be used ---------------------------------------------------------------------------------------

BAD_VALUES = [
    ("denoising_step_list", value, "fall strictly from at most 1000 and stay above 0")
    for value in ("[]", "[500, 750]", "[750, 750]", "[1001, 9]", "[9, 0]", "[9, a]", "9", "[9, true]", "{a: 1}", "null")
] + [
    ("warp_denoising_step", "1", "true or false"), ("warp_denoising_step", "'true'", "true or false"),
    ("independent_first_frame", "null", "true or false"), ("timestep_shift", "0", "above 0"),
    ("timestep_shift", ".inf", "above 0"), ("timestep_shift", "five", "above 0"), ("context_noise", "-1", "below 1000"),
    ("context_noise", "1000", "below 1000"), ("context_noise", ".nan", "below 1000"),
    ("num_frame_per_block", "0", "at least 1"), ("num_frame_per_block", "3.0", "at least 1"),
    ("num_frame_per_block", "true", "at least 1"), ("height", "-480", "at least 1"), ("width", "'832'", "at least 1"),
    ("dtype", "float16", "bfloat16 or float32"), ("model", "''", "some text"), ("model", "3", "some text"),
    ("kv_cache", "full", "a group"), ("model_kwargs", "[1]", "a group")
]


@pytest.mark.parametrize("key, value, allowed", BAD_VALUES)
def test_bad_value_names_place_key_and_allowed(write, key, value, allowed):
    """A value of the wrong type or range: file, line, key, what was found, what is allowed; the same through --set."""
    path = write(f"# one\n# two\n{key}: {value}\n")
    found = re.escape(f"{path}:3: {key}={yaml.safe_load(value)!r}")
    with pytest.raises(ConfigError, match=rf"{found} is not allowed\. Allowed: .*{allowed}"):
        load(path)
    with pytest.raises(ConfigError, match=rf"^--set {key}=.*: {key}=.*Allowed: .*{allowed}"):
        load(write("{}"), overrides=[f"{key}={value}"])


BAD_FILES = {
    "empty": ("", "a.yaml: is empty"), "comment only": ("# nothing\n", "a.yaml: is empty"),
    "list": ("- 1\n", "a.yaml: holds a list"), "one value": ("rolling", "a.yaml: holds a single value"),
    "syntax": ("height: 8\nwidth: [1\nmodel: x\n", r"a.yaml:3: not valid YAML"),
    "tab": ("height: 8\n\twidth: 8\n", r"a.yaml:2: not valid YAML"),
    "duplicate": ("height: 8\nwidth: 8\nheight: 9\n", "a.yaml:3: not valid YAML: found duplicate key height"),
    "duplicate inside": ("kv_cache:\n  policy: full\n  policy: sink\n", "a.yaml:3: .*YAML: found duplicate key policy"),
    "two documents": ("height: 8\n---\nwidth: 8\n", "a.yaml:2: not valid YAML"),
    "python object": ("height: !!python/name:os.system\n", "a.yaml:1: not valid YAML"),
    "alias to itself": ("kv_cache: &a\n  policy: *a\n", r"a.yaml:\d: not valid YAML"),
    "binary": (b"\xff\xfe\x00\x01", "a.yaml: cannot be read as YAML"),
    "null key": ("null: 3\n", "a.yaml: .* Correct it"), "left open": ("height: ???\n", "a.yaml:1: height has no value"),
    "unresolved": ("\nheight: ${nothing}\n", "a.yaml:2: height=.*nothing.* has no value: it names nothing"),
    "circle": ("extends: x/../a.yaml\n", "in a circle: .*a.yaml extends .*a.yaml"),
    "no base": ("extends: ba.yaml\n", "ba.yaml: no such file, though .*a.yaml extends it. Did you mean a.yaml?"),
    "bases": ("extends: [a, b]\n", "a.yaml:1: extends=.* is not allowed"),
    "typo": ("height: 8\nnum_frames_per_block: 3\n", "a.yaml:2: unknown key .* Did you mean num_frame_per_block?"),
    "number as key": ("1: 2\n", "a.yaml:1: unknown key 1. Valid keys: denoising_step_list, .*configs/base.yaml"),
    "group typo": ("model_kwargs:\n  sink_sice: 2", "a.yaml:2: unknown key model_kwargs.sink_sice. .*mean sink_size?"),
    "field typo": (own("sink", 21, 3) + "  sink_framez: 3", "a.yaml:6: unknown key .*framez. Did you mean sink_frames"),
    "field of another": ("kv_cache:\n  policy: full\n  votes: both", "a.yaml:3: .*key kv_cache.votes. Valid keys: win"),
    "no policy": ("kv_cache:\n window_frames: 21", "a.yaml:1: kv_cache lacks policy. Add one of: full, participative,"),
    "policy typo": ("kv_cache:\n  policy: rollin", "a.yaml:2: cache policy 'rollin' is unknown. Did you mean rolling?"),
    "policy list": ("kv_cache:\n  policy: [sink]\n", "a.yaml:2: cache policy .* is unknown"),
    "nested field": ("kv_cache:\n  policy: full\n  window_frames: {a: 1}\n", "a.yaml:3: .*window_frames=.*not allowed"),
    "missing field": ("kv_cache:\n  policy: rolling\n", "a.yaml: kv_cache lacks window_frames"),
    "policy refuses": (own("rolling", 200), "a.yaml:3: kv_cache.window_frames=200 is outside 1..100"),
    "cache key on top": ("sink_size: 5\n", "a.yaml:1: sink_size is a key of the cache. Set kv_cache.sink_frames"),
    "window 0": (legacy(0), "a.yaml:2: model_kwargs.local_attn_size=0 is not allowed. Allowed: -1"),
    "window -2": (legacy(-2), "model_kwargs.local_attn_size=-2 is not allowed"),
    "sink -1": (legacy(21, -1), "a.yaml:3: model_kwargs.sink_size=-1 is not allowed"),
    "no window": (legacy(None, 10), "model_kwargs.sink_size=10 has no window .*local_attn_size"),
    "clip": (legacy(-1, num_training_frames=0), "num_training_frames=0 is not allowed"),
    "window differs": (own("sink", 21, 3) + legacy(12), r"size=12 contradicts kv_cache.window_frames=21 .*a.yaml:1\)"),
    "sink differs": (own("sink", 21, 3) + legacy(21, 4), "sink_size=4 contradicts kv_cache.sink_frames=3"),
    "sink of rolling": (own("rolling", 21) + legacy(21, 4), "sink_size=4 contradicts kv_cache.sink_frames=0"),
    "two shifts": ("timestep_shift: 5\nmodel_kwargs: {timestep_shift: 8}", "a.yaml:2: .*timestep_shift=8 contradicts"),
    "open steps": ("denoising_step_list: [1000, 500]\n", "a.yaml:1: .*without warp_denoising_step"),
    "steps between rows": ("warp_denoising_step: true\ndenoising_step_list: [1000, 62.5]", "a.yaml:2: .*whole numbers"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_says_where_and_what(write, name):
    """A file that cannot be used is refused with its place and the reason, on one line."""
    text, message = BAD_FILES[name]
    with pytest.raises(ConfigError, match=message) as raised:
        load(write(text))
    assert "\n" not in str(raised.value)


def test_error_names_the_file_that_set_the_key(write):
    """A bad value in a base is reported there, not in the file that extends it."""
    write("height: 8\nwidth: -1\n", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml:2: width=-1"):
        load(write("extends: base.yaml\n"))


def test_long_circle_is_named(write):
    """Every file of a circle of extends is in the message."""
    write("extends: c.yaml", "b.yaml")
    write("extends: b.yaml", "c.yaml")
    with pytest.raises(ConfigError, match="a.yaml extends .*b.yaml extends .*c.yaml extends .*b.yaml"):
        load(write("extends: b.yaml"))


def test_missing_file_suggests_its_neighbour():
    """A mistyped path is answered with the nearest file of that folder."""
    with pytest.raises(ConfigError, match="no such file. Did you mean self_forcing.yaml?"):
        load(CONFIGS / "self_forcin.yaml")


@pytest.mark.parametrize("text, flags, message", [
    (legacy(21, 14), {}, "need 18 frames, which exceeds --Budget 16.*--is_ds_only 1.*--Budget 18 to 21.*sink_size=12"),
    (legacy(21, 10), {"recent": 8}, "sink_size=10 and --Recent 8 need 18 frames.*--Budget 18 to 21.*sink_size=8"),
    (legacy(21, 18), {}, r"need 22 frames, .*--is_ds_only 1 \([^)]*\), or --set model_kwargs.sink_size=12"),
    (legacy(12, 3), {}, "exceeds local_attn_size=12.*12 or less"), (legacy(21, 10), {"budget": 22}, "22 exceeds .*21"),
    (legacy(21, 10), {"policy": "sink", "budget": 16}, "--Budget 16 sets .*, which policy sink does not have"),
    (own("rolling", 21), {"budget": 16}, "--Budget 16 sets kv_cache.budget_frames, which policy rolling does not have"),
    (own("sink", 21, 3), {"recent": 4}, "--Recent 4 sets kv_cache.recent_frames, which policy sink does not have"),
    (DEEP_FORCING, {"is_ds_only": 1, "budget": 16}, "without --is_ds_only"),
    (own("rolling", 21), {"policy": "participative"}, "lacks sink_frames, budget_frames, recent_frames"),
    (own("rolling", 21), {"policy": "sinc"}, "--policy sinc: cache policy 'sinc' is unknown. Did you mean sink?"),
    (own("sink", 21, 3), {"overrides": ["model_kwargs.sink_size=4"]}, "^--set model_kwargs.sink_size=4: .*contradicts"),
    (own("sink", 21, 3), {"overrides": ["kv_cache.policy=sinc"]}, "^--set kv_cache.policy=sinc: .*Did you mean sink?"),
    (own("sink", 21, 3), {"overrides": ["seed=3"]}, "^--set seed=3: a key of training.*--seed"),
    (own("sink", 21, 3), {"overrides": ["kv_cache.sink_frame=4"]}, "^--set .*unknown key .* Did you mean sink_frames?"),
    (own("sink", 21, 3), {"overrides": ["kv_cache.sink_frames.x=4"]},
     "^--set .*kv_cache.sink_frames={'x': 4} is not allowed"),
    (own("sink", 21, 3), {"overrides": ["heigth=4"]}, "^--set heigth=4: unknown key heigth. Did you mean height?"),
    (own("sink", 21, 3), {"overrides": ["height"]}, "^--set height: write key=value"),
    (own("sink", 21, 3), {"overrides": ["kv_cache..x=1"]}, "write key=value"),
    (own("sink", 21, 3), {"overrides": ["=1"]}, "write key=value"),
    (own("sink", 21, 3), {"overrides": ["height=["]}, "cannot be read as YAML: .*expected .*node content"),
    (own("sink", 21, 3), {"overrides": ["extends=b.yaml"]}, "only a file can extend"),
])
def test_bad_flag_says_what_to_do(write, text, flags, message):
    """Flags that do not fit the config are refused in the words of the command line."""
    with pytest.raises(ConfigError, match=message):
        load(write(text), **flags)


# --- resolved --------------------------------------------------------------------------------------------------

def some_settings(rng):
    """Random settings that are allowed."""
    warp = rng.random() < 0.5
    steps = sorted(rng.sample(range(1, 1001), rng.randint(1, 6)), reverse=True)
    name = rng.choice(sorted(FAKE))
    values = (rng.randint(8, 40), rng.randint(0, 4), rng.choice(["released", "original"]), rng.randint(6, 8), 2)
    return {
        "denoising_step_list": steps if warp else [step - 0.5 for step in steps], "warp_denoising_step": warp,
        "timestep_shift": rng.choice([1, 5.0, 1e-7, 8]), "context_noise": rng.choice([0, 12.5, 999]),
        "num_frame_per_block": rng.randint(1, 6), "independent_first_frame": rng.random() < 0.5,
        "height": rng.choice([None, 480]), "width": rng.choice([None, 832]),
        "dtype": rng.choice([None, "bfloat16", "float32"]), "model": rng.choice(["auto", "tiny", "on/off.yaml"]),
        "kv_cache": group(name, *values[:len(fields(FAKE[name]))]),
    }


@pytest.mark.parametrize("seed", range(20))
def test_resolved_loads_back(write, seed):
    """The saved config, as YAML or as JSON, is the run's config: loading it gives an equal one."""
    rng = random.Random(seed)
    settings = some_settings(rng)
    pair = ["warp_denoising_step", "denoising_step_list"]
    half = {key: settings[key] for key in [*pair, *rng.sample(sorted(settings.keys() - pair), 4)]}
    for given in (settings, half):
        config = load(write(yaml.safe_dump(given)))
        resolved = config.resolved()
        assert {key: resolved[key] for key in given} == given
        assert list(resolved) == [f.name for f in fields(Config)]
        assert load(write(yaml.safe_dump(resolved, sort_keys=False))) == config
        assert load(write(json.dumps(resolved))).resolved() == resolved
