"""Settings: the fixed keys, strictness, `--set`, and the files in configs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.engine.options import EngineOptions
from pipeline.errors import ConfigError
from pipeline.settings.base import Settings, answer_settings, as_yaml, load_settings
from pipeline.settings.job import EngineSettings, JobSettings
from pipeline.settings.nightly import NightlySettings
from pipeline.settings.other_jobs import ConvertSettings, ReportSettings
from pipeline.synthetic.scenes.dataset import ScenesSettings
from pipeline.training.settings import TrainSettings

CONFIGS = Path(__file__).parents[2] / "configs"
REQUIRED = ["model.base=base", "input.path=in", "output.path=out"]


def load(*assignments: str, file: Path | None = None) -> JobSettings:
    return load_settings(JobSettings, file, [*REQUIRED, *assignments])


def value_at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.base", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        ("model.adapter", "s3://bucket/pytorch_model.bin", "s3://bucket/pytorch_model.bin"),
        ("model.adapter", "null", None),
        ("model.dtype", "float32", "float32"),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.dtype", "float16", "float16"),
        ("model.device", "auto", "auto"),
        ("model.device", "cpu", "cpu"),
        ("model.device", "cuda", "cuda"),
        ("model.decode_route", "released", "released"),
        ("model.decode_route", "prefill", "prefill"),
        ("model.top_k_experts", "2", 2),
        ("model.lora_alpha", "512", 512),
        ("model.lora_alpha", "null", None),
        ("model.min_pixels", "3136", 3136),
        ("model.max_pixels", "1003520", 1003520),
        ("input.path", "s3://b/shards/", "s3://b/shards/"),
        ("input.path", "[a.parquet, 'b/*.parquet']", ["a.parquet", "b/*.parquet"]),
        ("input.columns.id", "url", "url"),
        ("input.columns.id", "null", None),
        ("input.columns.image", "jpg", "jpg"),
        ("input.columns.images", "pictures", "pictures"),
        ("input.columns.prompt", "question", "question"),
        ("input.columns.messages", "chat", "chat"),
        ("input.prompt", "Describe this image.", "Describe this image."),
        ("input.limit", "100", 100),
        ("output.path", "s3://b/captions/", "s3://b/captions/"),
        ("output.token_ids", "true", True),
        ("output.routes", "true", True),
        ("generation.max_new_tokens", "64", 64),
        ("generation.temperature", "0", 0),
        ("generation.temperature", "0.7", 0.7),
        ("generation.top_p", "0.9", 0.9),
        ("generation.top_p", "1e-3", 0.001),
        ("generation.top_k", "50", 50),
        ("generation.repetition_penalty", "1.05", 1.05),
        ("generation.stop", '["\\n", "。"]', ["\n", "。"]),
        ("generation.seed", "7", 7),
        ("replicas", "8", 8),
        ("ray.address", "10.0.0.1:6379", "10.0.0.1:6379"),
    ],
)
def test_a_fixed_key_takes_its_value_from_yaml_text(key: str, text: str, value: Any) -> None:
    assert value_at(load(f"{key}={text}"), key) == value


def test_defaults_of_the_fixed_keys() -> None:
    settings = load()
    assert settings.model.top_k_experts == 1
    assert settings.model.decode_route == "released"
    for key in (
        "model.adapter",
        "model.lora_alpha",
        "model.min_pixels",
        "model.max_pixels",
        "input.limit",
        "ray.address",
    ):
        assert value_at(settings, key) is None
    generation = settings.generation
    assert generation.seed == 0
    left_to_the_checkpoint = (
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "stop",
    )
    assert {getattr(generation, key) for key in left_to_the_checkpoint} == {None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.dtyp=float32", "model.dtyp: unknown key; did you mean model.dtype?"),
        ("input.column.id=a", "input.column: unknown key; did you mean input.columns?"),
        ("replica=2", "replica: unknown key; did you mean replicas?"),
        ("output.prompts=columns", "output.prompts: is called output.prompt_layout now; rename it"),
        (
            "generation.max_tokens=5",
            "generation.max_tokens: unknown key; did you mean generation.max_new_tokens?",
        ),
        ("replicas=two", "replicas: input should be a valid integer, got 'two'"),
        ("replicas=0", "replicas: input should be greater than or equal to 1, got 0"),
        ("replicas='2'", "replicas: input should be a valid integer, got '2'"),
        ("replicas=[1]", "replicas: input should be a valid integer, got [1]"),
        (
            "replicas.min=3",
            "replicas.max: missing; set it in the file or with --set replicas.max=...",
        ),
        ("replicas={min: 3, max: 2}", "replicas: min 3 is above max 2, got {'min': 3, 'max': 2}"),
        (
            "replicas={max: 2, mx: 2}",
            "replicas.mx: unknown key; did you mean replicas.max?",
        ),
        ("output.routes=1", "output.routes: input should be a valid boolean, got 1"),
        (
            "model.dtype=fp8",
            "model.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'fp8'",
        ),
        ("model.base=null", "model.base: input should be a valid string, got None"),
        ("model=base", "model: expected a group of keys, got 'base'"),
        ("input.path=[]", "input.path: is empty; expected a path or a list of paths, got []"),
        (
            "input.prompt=' '",
            "input.prompt: is empty; expected a question or an instruction, or null, got ' '",
        ),
        (
            "generation.top_p=1.5",
            "generation.top_p: input should be less than or equal to 1, got 1.5",
        ),
        ("generation.stop=['']", "generation.stop: holds an empty string, got ['']"),
        ("generation.stop=end", "generation.stop: input should be a valid list, got 'end'"),
        ("replicas", "--set replicas: expected dotted.key=value"),
        (".a=1", "--set .a=1: expected dotted.key=value"),
        ("model.base.x=1", "--set model.base.x: 'base' is a value, not a group of keys"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_key(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(assignment)
    assert str(caught.value) == message


def test_experts_are_not_folded_into_rounded_weights() -> None:
    assert load("model.quantize=int8").model.quantize == "int8"
    with pytest.raises(ConfigError, match="engine.fold_experts: weights that model.quantize"):
        load("model.quantize=fp8", "engine.fold_experts=true")


def test_text_that_is_no_yaml_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^--set generation.stop: '\[a' is no valid YAML .*$"):
        load("generation.stop=[a")


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("input.prompt=caf\udce9?", "input.prompt"),  # an argument in Latin-1
        ('input.prompt="\\ud83d"', "input.prompt"),
        ("input.path=[a, caf\udce9]", "input.path"),
        ("input.prompts.a=caf\udce9", "input.prompts.a"),
    ],
)
def test_text_that_cannot_be_written_is_an_error_that_names_its_key(
    assignment: str, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(assignment)
    assert str(caught.value).startswith(f"{key}: is no valid Unicode (half a surrogate pair")
    assert str(caught.value).isprintable()


LITERAL = [
    *(
        "Count the # of cats",
        "#hashtag",
        "two\nlines",
        " outer blanks ",
        "Answer: yes or no",
        "a: 1\na: 2",
        '"Stop" is what?',
    ),
    *(
        "yes",
        "on",
        "1e3",
        "2026-11-25",
        "2026-13-45",
        "012",
        "12:30:00",
        "~x",
        "@a",
        "%a",
        "`a`",
        "*a",
        "&a",
        "!x",
        "- a",
    ),
    *(
        "a: b",
        "[x",
        "[a]",
        "---",
        "...",
        "? a",
        "| a",
        "a:",
        "'a' # b",
        "!!python/object:os.x y",
        "[" * 1000,
        "null and void",
    ),
]


@pytest.mark.parametrize("text", LITERAL)
def test_text_that_is_set_is_taken_as_it_stands_and_what_yaml_makes_of_it_is_said(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(f"input.prompts.a={text}", f"input.image_root={text}")
    assert (settings.input.prompts["a"], settings.input.image_root) == (text, text)
    said = capsys.readouterr().err.split("\n")
    as_in_yaml = text in ("~x", "null and void")
    assert [line[:40] for line in said] == (
        [""]
        if as_in_yaml
        else [
            "--set input.prompts.a: taken as the text",
            "--set input.image_root: taken as the tex",
            "",
        ]
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ('"a # b"', "a # b"),
        ('"a\\nb"', "a\nb"),
        (" 'a' ", "a"),
    ],
)
def test_null_and_whole_quoted_strings_are_yaml_where_text_is_set(
    text: str, value: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(f"input.prompt={text}").input.prompt == value
    assert capsys.readouterr().err == ""


def test_columns_in_braces_are_a_prompt_and_no_group_of_keys() -> None:
    assert load("input.prompt={question}").input.prompt == "{question}"
    assert load("input.prompt={question} Be brief.").input.prompt == "{question} Be brief."


def test_text_within_lists_and_groups_that_are_set_is_taken_as_it_stands() -> None:
    settings = load(
        "generation.stop=[on, 012, 'a b']",
        "input.prompts={a: yes, b: 12:30}",
        "input.path=[2026-11-25, no]",
    )
    assert settings.generation.stop == ["on", "012", "a b"]
    assert settings.input.prompts == {"a": "yes", "b": "12:30"}
    assert settings.input.path == ["2026-11-25", "no"]
    assert load("input.path=[ab]*.parquet").input.path == "[ab]*.parquet"


ODD = "; quote it to mean text, or write true, false or a plain number"
MARKS = "; quote a text that begins with a mark such as @ % ` { [ & * ! | > - or holds ': '"
BOMB = "generation:\n  json_schema:\n    a0: &a0 [x]\n" + "".join(
    f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "input:\n  prompt: yes\n",
            ", line 2: input.prompt: yes is read as true or false, not as text; quote it: 'yes'",
        ),
        (
            "input: {prompt: 2026-13-45}",
            ", line 1: input.prompt: 2026-13-45 is read as a date, not as text; quote it: "
            "'2026-13-45'",
        ),
        (
            "input:\r\n  prompt: 012",
            ", line 2: input.prompt: 012 is read as a number, not as text; quote it: '012'",
        ),
        (
            "input:\n  prompts:\n    a: 12:30:00",
            ", line 3: input.prompts.a: 12:30:00 is read as a number, not as text; quote it: "
            "'12:30:00'",
        ),
        (
            "input:\n  prompts:\n    no: a",
            ", line 3: input.prompts.no: no is read as true or false, not as text; quote it: 'no'",
        ),
        (
            "input: {path: [a, 2026]}",
            ", line 1: input.path: 2026 is read as a number, not as text; quote it: '2026'",
        ),
        (
            "model: {dtype: off}",
            ", line 1: model.dtype: off is read as true or false, not as text; quote it: 'off'",
        ),
        (
            "generation: {seed: 012}",
            ", line 1: generation.seed: YAML reads 012 as a number of its own kind" + ODD,
        ),
        (
            "generation:\n json_schema:\n  enum: [yes]",
            ", line 3: generation.json_schema.enum: YAML reads yes as true or false of its own kind"
            + ODD,
        ),
        (
            "replicas: 2\nray:\nreplicas: 3",
            ", line 3: replicas: stands here a second time; keep one of the two",
        ),
        (
            "engine: &e {}\npreparation:\n  <<: *e",
            ", line 3: preparation: merge keys (<<) are not read; write the keys out",
        ),
        (
            BOMB,
            ", line 3: generation.json_schema.a5: more than 100,000 values or 100 levels, aliases "
            "followed",
        ),
        (
            "flags: &a [*a]",
            ", line 1: flags: more than 100,000 values or 100 levels, aliases followed",
        ),
        ("[" * 1000, ": no valid YAML (nested too deep)"),
        (
            "replicas: !!python/object:os.x 1",
            ': no valid YAML (tags are not read; write the value without in "<unicode string>", '
            "line 1, column 11: replicas: !!python/object:os.x 1 ^)",
        ),
        ("", ": expected keys and values, found nothing: the file is empty"),
        (
            "input:\n  prompt: Count the # of cats",
            ", line 2: input.prompt: ends before '# of cats', which is a comment; quote the text, "
            "or put two blanks "
            "before the comment",
        ),
        (
            "input:\n  prompts:\n    tag: #hashtag\n",
            ", line 3: input.prompts.tag: is empty: '#hashtag' is a comment; quote it to mean text",
        ),
        (
            "input: {prompt: {question}}",
            ", line 1: input.prompt: is read as a group of keys; quote the text",
        ),
        ("input:\n  prompt: [sic]", ", line 2: input.prompt: is read as a list; quote the text"),
        (
            "input:\n  prompt: &you are here",
            ", line 2: input.prompt: &you is read as a mark of YAML, not as text; quote what is "
            "text",
        ),
        (
            "a: @you",
            ": no valid YAML (while scanning for the next token found character '@' that cannot "
            "start any token in "
            '"<unicode string>", line 1, column 4: a: @you ^)' + MARKS,
        ),
        (
            "a: Answer: yes or no",
            ': no valid YAML (mapping values are not allowed here in "<unicode string>", line 1, column 10: '
            "a: Answer: yes or no ^)" + MARKS,
        ),
    ],
)
def test_what_yaml_reads_unlike_people_is_one_line_that_names_file_line_and_key(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content.encode())
    with pytest.raises(ConfigError) as caught:
        load(file=file)
    assert str(caught.value) == f"--config {file}{message}"


def test_comments_stand_where_no_text_could_be_meant(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "input:\n  path: in  # ours\n  prompt: 'Count the # of cats'  # quoted\n  image_root: # "
        "none\n  prompts: {}  # no\n"
        "generation: {stop: [a b]}  # one\nflags:\n  refusals:\n  - &a 'I am'\n  - *a\n  - I "
        "cannot  # so\n"
    )
    settings = load(file=file)
    assert (settings.input.prompt, settings.input.image_root) == ("Count the # of cats", None)
    assert (settings.generation.stop, settings.flags.refusals) == (
        ["a b"],
        ["I am", "I am", "I cannot"],
    )


def test_the_value_that_an_error_shows_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        load("replicas=" + "x" * 1_000_000)
    assert str(caught.value) == f"replicas: input should be a valid integer, got '{'x' * 198}…"


def test_files_of_windows_and_quoted_text_load_as_they_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes("\ufeffreplicas: 2\r\ninput:\r\n  prompt: 'yes'\r\n  limit: null\r\n".encode())
    settings = load(file=file)
    assert (settings.replicas, settings.input.prompt, settings.input.limit) == (2, "yes", None)


def test_min_pixels_above_max_pixels_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^model: min_pixels 200 is above max_pixels 100"):
        load("model.min_pixels=200", "model.max_pixels=100")


@pytest.mark.parametrize("missing", ["model.base", "input.path", "output.path"])
def test_a_missing_required_key_is_named(missing: str) -> None:
    others = [assignment for assignment in REQUIRED if not assignment.startswith(missing)]
    with pytest.raises(ConfigError) as caught:
        load_settings(JobSettings, None, others)
    assert (
        str(caught.value) == f"{missing}: missing; set it in the file or with --set {missing}=..."
    )


def test_a_mistyped_required_key_is_named_before_the_missing_one() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^input.pth: unknown key; did you mean input.path\?; input.path: missing",
    ):
        load_settings(JobSettings, None, ["model.base=base", "input.pth=in", "output.path=out"])


def test_set_goes_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("replicas: 2\ngeneration:\n  seed: 3\n  top_k: 5\ninput:\n  columns:\n")
    settings = load(
        "generation.seed=4", "input.columns.id=key", "replicas=3", "replicas=4", file=file
    )
    assert (settings.replicas, settings.generation.seed, settings.generation.top_k) == (4, 4, 5)
    assert settings.input.columns.id == "key"


def test_of_a_value_and_a_group_of_one_key_the_later_counts(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("replicas: 2\n")
    settings = load("replicas.min=3", "replicas.max=5", file=file)
    assert (settings.fewest_replicas, settings.most_replicas, settings.grows) == (3, 5, True)
    settings = load("replicas.max=5", "replicas=4", file=file)
    assert (settings.fewest_replicas, settings.most_replicas, settings.grows) == (4, 4, False)
    assert not load("replicas={min: 2, max: 2}").grows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "no valid YAML"),
        (b"\xff\xfe\xfa", "no valid YAML"),
        (b"- a\n- b\n", "expected keys and values, found list"),
    ],
)
def test_a_file_that_is_no_settings_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--config {file}: {message}[^\n]*$"):
        load(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file or directory$"):
        load(file=tmp_path / "nowhere.yaml")


PATHS = ["input.path=in", "output.path=out"]


@pytest.mark.parametrize(
    ("file", "kind", "missing"),
    [
        ("demo.yaml", JobSettings, []),
        ("demo-photographs.yaml", JobSettings, []),
        ("caption.yaml", JobSettings, PATHS),
        ("vqa.yaml", JobSettings, PATHS),
        ("nightly.yaml", NightlySettings, PATHS),
        ("awaker2.5-vl.yaml", JobSettings, PATHS),
        ("llava-1.5.yaml", JobSettings, PATHS),
        ("minicpm-llama3-v-2.5.yaml", JobSettings, PATHS),
        ("megrez-3b-omni.yaml", JobSettings, PATHS),
        ("llava-1.6.yaml", JobSettings, PATHS),
        ("deepseek-vl.yaml", JobSettings, PATHS),
        ("paligemma.yaml", JobSettings, PATHS),
        ("scenes.yaml", ScenesSettings, []),
        ("train-small.yaml", TrainSettings, []),
        ("train-qwen2-vl-7b.yaml", TrainSettings, ["data.path=in"]),
    ],
)
def test_the_files_in_configs_load(file: str, kind: type[Settings], missing: list[str]) -> None:
    load_settings(kind, CONFIGS / file, missing)


def test_no_file_in_configs_is_left_out() -> None:
    (parametrize,) = test_the_files_in_configs_load.pytestmark
    assert {file for file, _, _ in parametrize.args[1]} == {path.name for path in CONFIGS.iterdir()}


def test_settings_written_as_yaml_load_as_themselves(tmp_path: Path) -> None:
    settings = load("generation.stop=['\\n', 描述]", "input.columns.id=null", "model.lora_alpha=16")
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(settings))
    assert load_settings(JobSettings, file, []) == settings
    assert yaml.safe_load(as_yaml(settings))["replicas"] == 1


def test_convert_takes_base_adapter_and_output() -> None:
    settings = load_settings(
        ConvertSettings, None, ["model.base=b", "model.adapter=a", "output.path=o"]
    )
    assert (settings.model.base, settings.model.adapter, settings.output.path) == ("b", "a", "o")
    with pytest.raises(ConfigError, match=r"input: unknown key"):
        load_settings(ConvertSettings, None, ["model.base=b", "output.path=o", "input.path=i"])


@pytest.mark.parametrize(
    "prompt",
    ['Answer in JSON: {"a": 1}', "What is {}?", "{a!r}", "{a:>3}", "an open { brace", "} closed"],
)
def test_a_prompt_whose_braces_are_no_columns_is_an_error_that_says_how_to_write_them(
    prompt: str,
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"input\.prompt: is no template .* braces themselves are written \{\{ and \}\}",
    ):
        load(f"input.prompt={json.dumps(prompt)}")


@pytest.mark.parametrize(
    ("assignment", "decides"),
    [
        ("engine.fold_experts=true", True),
        ("engine.batch_size=7", False),
        ("engine.answer_cache=0", False),
        ("output.prompt_layout=columns", True),
        ("output.token_ids=true", True),
        ("output.routes=true", True),
        ("output.samples=0", False),
        ("model.device=cpu", False),
        ("model.dtype=float32", True),
        ("model.quantize=int8", True),
        ("model.prepack=false", True),
        ("input.path=elsewhere", False),
        ("input.limit=3", True),
        ("images.max_pixels=3", True),
        ("audio.longer=cut", True),
        ("fetch.tries=9", False),
        ("generation.seed=9", True),
        ("flags.min_words=9", True),
        ("replicas=2", False),
        ("ray.address=here", False),
    ],
)
def test_a_setting_says_whether_it_may_change_answers(assignment: str, decides: bool) -> None:
    required = ["model.base=m", "input.path=in", "output.path=out"]
    before = answer_settings(load_settings(JobSettings, None, required))
    after = answer_settings(load_settings(JobSettings, None, [*required, assignment]))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == ({assignment.partition("=")[0]} if decides else set())


def test_engine_settings_are_the_engines_own_options() -> None:
    assert EngineSettings().to_options("released") == EngineOptions()
    changed = {
        "batch_size": 1,
        "batch_tokens": 2,
        "step_tokens": 3,
        "waiting": 4,
        "group_by_expert": False,
        "max_rounds_waiting": 5,
        "vision_cache_bytes": 6,
        "answer_cache": 7,
        "fold_experts": True,
    }
    assert changed.keys() == EngineSettings.model_fields.keys()
    options = EngineSettings.model_validate(changed).to_options("prefill")
    assert options == EngineOptions(**changed, decode_route="prefill")  # type: ignore[arg-type]


def test_a_key_is_only_called_renamed_where_its_new_name_is_a_key() -> None:
    with pytest.raises(
        ConfigError, match=r"^output.prompts: unknown key; did you mean output.path"
    ):
        load_settings(ReportSettings, None, ["output.path=out", "output.prompts=rows"])
