"""The start-up hook: what it reaches, what it leaves alone, what it costs.

Where the start itself is not the subject, processes are forked from one that started with the hook.
"""

import re
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava_integration
from llava_integration import boot
from llava_integration.plug.checkpoints import is_unfrozen


def test_a_process_that_imports_only_llava_knows_the_tower(world):
    code = (
        "import llava.model.builder as m, llava.model.llava_arch as a, "
        "llava.model.multimodal_encoder.builder as b;"
        "print([hasattr(f, '__wrapped__') for f in (m.load_pretrained_model, b.build_vision_tower,"
        " a.LlavaMetaModel.initialize_vision_modules, a.build_vision_tower)])"
    )
    assert "[True, True, True, True]" in world.python("-c", code)
    assert "[False, False, False, False]" in world.forked(
        "-c", code, LLM2CLIP_LLAVA_HOOK="0"
    )


def test_modules_loaded_before_the_hook_are_rebound(world):
    code = (
        "import llava.eval.model_vqa as user, llava.model.llava_arch as a;"
        "from llava_integration import boot;"
        "import os; del os.environ['LLM2CLIP_LLAVA_HOOK']; boot.install(); boot.install();"
        "print(hasattr(user.load_pretrained_model, '__wrapped__'), "
        "hasattr(a.build_vision_tower, '__wrapped__'),"
        " hasattr(a.build_vision_tower.__wrapped__, '__wrapped__'))"
    )
    assert "True True False" in world.forked("-c", code, LLM2CLIP_LLAVA_HOOK="0")


def test_a_failing_hook_leaves_llava_working_and_prints_why(world):
    code = (
        "import llava_integration.plug.hook as r\n"
        "def fails(module): raise RuntimeError('broken on purpose')\n"
        "r.complete = fails\n"
        "from llava.model import LlavaLlamaForCausalLM\n"
        "print(LlavaLlamaForCausalLM.__name__)"
    )
    output = world.forked("-c", code)
    assert output.strip().endswith("LlavaLlamaForCausalLM")
    assert "broken on purpose" in output


def test_start_up_imports_nothing(world):
    code = (
        "import sys; print([m for m in sys.modules if 'llm2clip' in m or 'llava' in m or m == "
        "'torch'])"
    )
    # the tests' own sitecustomize imports torch
    assert world.python("-c", code, PYTHONPATH="").strip() == "[]"


@pytest.mark.parametrize("target", ["module", "script"])
def test_launch_where_pth_files_are_not_read(world, target, tmp_path):
    """A module sees the hook, which is enough; a script also imports LLaVA."""
    finders = "import sys; print([type(finder).__name__ for finder in sys.meta_path])"
    knows = (
        "from llava.model.llava_arch import build_vision_tower as b; print(hasattr(b, "
        "'__wrapped__'))"
    )
    script = tmp_path / "only_llava.py"
    script.write_text(
        f"import sys\n{knows if target == 'script' else finders}\nprint(__name__, sys.argv[1:])\n"
    )
    paths = [
        str(tmp_path),
        str(Path(llava_integration.__file__).parents[1]),
        sysconfig.get_paths()["purelib"],
    ]
    words = ["-S", "-m", "llava_integration.boot", "--local_rank=1"]
    words += ["only_llava" if target == "module" else str(script), "--bf16", "True"]
    *_, seen, started = (
        world.python(*words, PYTHONPATH=":".join(paths)).strip().splitlines()
    )
    assert seen == "True" if target == "script" else boot.WATCHER in seen
    assert started == "__main__ ['--local_rank=1', '--bf16', 'True']"
    assert boot.WATCHER in world.python("-c", finders)
    assert boot.WATCHER not in world.python(
        "-S", "-c", finders, PYTHONPATH=":".join(paths)
    )


def test_a_fork_of_llava_under_another_name(world, tmp_path):
    """LLaVA's own code, copied to another package: known by its
    ``model/multimodal_encoder/builder.py``."""
    source = Path(find_spec("llava").origin).parent
    for path in source.rglob("*.py"):
        copied = tmp_path / "otherllava" / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(
            re.sub(r"\b(from|import) llava\b", r"\1 otherllava", path.read_text())
        )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import otherllava.model.builder as m
from otherllava.model.llava_arch import build_vision_tower, LlavaMetaModel
from otherllava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava_world import model_arguments
model = LlavaLlamaForCausalLM(LlavaConfig.from_pretrained({str(world.llm)!r}))
model.get_model().initialize_vision_modules(model_arguments({f"llm2clip:{world.towers['clip']}"!r}))
print(type(model.get_vision_tower()).__name__, model.config.llm2clip_tower["family"])
print([hasattr(f, "__wrapped__") for f in (m.load_pretrained_model, build_vision_tower)])
print([name for name in sys.modules if name.partition(".")[0] == "llava"])
"""
    lines = world.python("-c", code, PYTHONPATH=":".join(sys.path)).strip().splitlines()
    assert lines[-3:] == ["LLM2CLIPVisionTower clip", "[True, True]", "[]"]


def test_a_fork_with_towers_of_its_own_is_left_alone(world, tmp_path):
    """As Video-LLaVA, which has no get_vision_tower, and VILA, whose build_vision_tower takes two
    arguments."""
    builder = tmp_path / "otherllava" / "model" / "multimodal_encoder" / "builder.py"
    builder.parent.mkdir(parents=True)
    builder.write_text("def build_vision_tower(name, config): return name, config\n")
    builder.parents[1].joinpath("other_arch.py").write_text(
        "from .multimodal_encoder.builder import build_vision_tower as build\nclass Model:\n"
        "    def initialize_vision_modules(self, model_args, fsdp): "
        "return build(model_args.image_tower, fsdp)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        f"from types import SimpleNamespace as Arguments;"
        "from otherllava.model.other_arch import Model, build; print(hasattr(build, '__wrapped__'),"
        "Model().initialize_vision_modules(Arguments(image_tower='LanguageBind'), fsdp='no'))"
    )
    assert world.forked("-c", code).strip() == "True ('LanguageBind', 'no')"


def test_which_settings_train_the_tower():
    frozen = ({}, {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"})
    trained = (
        {"unfreeze_mm_vision_tower": True},
        {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"},
    )
    for settings in (*frozen, *trained):
        assert (
            is_unfrozen(settings)
            == is_unfrozen(SimpleNamespace(**settings))
            == (settings in trained)
        )
