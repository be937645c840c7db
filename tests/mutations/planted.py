"""Bugs that were once planted and passed every test, each with the test that fails on it since; run.py plants them."""

from dataclasses import dataclass

QUICKSTART, SCRIPTS = "tests/quickstart", "scripts/quickstart"


@dataclass(frozen=True)
class Bug:
    """``old`` in ``file`` becomes ``new``; ``test``, a pytest id, must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def plant(self, text: str) -> str:
        """The file with the bug; raises ValueError unless ``old`` occurs once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


PLANTED = (
    Bug(
        "bf16 embeds without the adapter",
        "llm2clip_plugin/text/encoder.py",
        "return cast_adapter(wrapped, self.dtype)",
        "return wrapped.unload()",
        "tests/text/test_encoder.py::test_an_adapter_counts_in_half_precision_as_in_float32",
    ),
    Bug(
        "towers trained on test shards",
        f"{SCRIPTS}/parts.sh",
        'train "$1" "$2" "$3" "$DATA/all/train-*.tar"',
        'train "$1" "$2" "$3" "$DATA/all/test-*.tar"',
        f"{QUICKSTART}/test_quickstart_parts.py::test_towers_differ_in_their_cache_alone",
    ),
    Bug(
        "the report takes a tower that was trained on test shards",
        f"{SCRIPTS}/inputs.py",
        'if path.parent.name != folder or not path.name.startswith("train-"):',
        "if path.parent.name != folder:",
        f"{QUICKSTART}/test_quickstart_parts.py::test_a_tower_of_other_shards_is_refused",
    ),
    Bug(
        "stage 1 trained on the test shard",
        f"{SCRIPTS}/parts.sh",
        "scripts/finetune_llm.py llm2clip_plugin/data/emoji/train-noto.tar",
        "scripts/finetune_llm.py llm2clip_plugin/data/emoji/test-noto.tar",
        f"{QUICKSTART}/test_quickstart_parts.py::test_stage_1_reads_training_captions_and_is_validated_on_validation",
    ),
    Bug(
        "both towers trained against the raw LLM's cache",
        f"{SCRIPTS}/parts.sh",
        'watched tuned "$1" "tuned-seed$1"',
        'watched tuned "$1" raw',
        f"{QUICKSTART}/test_quickstart_parts.py::test_towers_differ_in_their_cache_alone",
    ),
    Bug(
        "the report takes a tower of the other teacher",
        f"{SCRIPTS}/inputs.py",
        '"tuned": (f"tuned-{seed}",)',
        '"tuned": ("raw", f"tuned-{seed}")',
        f"{QUICKSTART}/test_quickstart_parts.py::test_a_tower_against_the_other_teachers_cache_is_refused",
    ),
    Bug(
        "the fine-tuned cache embedded without its adapter",
        f"{SCRIPTS}/parts.sh",
        'reading=(--adapter "$DATA/llm/${1#tuned-}/adapter")',
        "reading=()",
        f"{QUICKSTART}/test_quickstart_parts.py::test_a_cache_is_embedded_with_the_adapter_of_its_seed",
    ),
    Bug(
        "the report takes a fine-tuned cache without its adapter",
        f"{SCRIPTS}/inputs.py",
        "if used != expected:",
        "if used and used != expected:",
        f"{QUICKSTART}/test_quickstart_parts.py::test_a_cache_of_another_adapter_is_refused",
    ),
    Bug(
        "'before' and 'after' projectors at different rates",
        f"{SCRIPTS}/miniature.sh",
        '--per_device_train_batch_size "${BATCHES[0]}" ${PRETRAIN[@]+"${PRETRAIN[@]}"}',
        '--per_device_train_batch_size "${BATCHES[0]}" --learning_rate "1e-${#name}"',
        f"{QUICKSTART}/test_miniature_stages.py::test_both_sides_are_started_alike_but_for_the_tower",
    ),
    Bug(
        "scores take sides that were trained otherwise",
        f"{SCRIPTS}/miniature.py",
        'if name.startswith("after"):',
        'if name.startswith("later"):',
        f"{QUICKSTART}/test_miniature_stages.py::test_sides_that_were_trained_otherwise_are_refused",
    ),
    Bug(
        "no Holm in the quickstart's table",
        f"{SCRIPTS}/claims.py",
        "p, p_each = holm([one.p for one in total]), {",
        "p, p_each = [one.p for one in total], {",
        f"{QUICKSTART}/test_quickstart_report.py::test_p_is_adjusted_for_all_rows_and_each_training_has_its_own",
    ),
    Bug(
        "'alone' from the p over all seeds",
        f"{SCRIPTS}/claims.py",
        "p_by_seed={s: p_each[s][place] for s in seeds}",
        "p_by_seed={s: p[place] for s in seeds}",
        f"{QUICKSTART}/test_quickstart_report.py::test_p_is_adjusted_for_all_rows_and_each_training_has_its_own",
    ),
    Bug(
        "clusters of concepts instead of families: towers",
        f"{SCRIPTS}/scores.py",
        'RetrievalConfig(group="concept", cluster="family", ks=(1, 10))',
        'RetrievalConfig(group="concept", cluster="concept", ks=(1, 10))',
        f"{QUICKSTART}/test_quickstart_report.py::test_families_are_drawn_not_concepts",
    ),
    Bug(
        "clusters of concepts instead of families: teachers",
        f"{SCRIPTS}/scores.py",
        "clusters=[family[concept] for _, concepts in ranked for concept in concepts]",
        "clusters=[concept for _, concepts in ranked for concept in concepts]",
        f"{QUICKSTART}/test_quickstart_report.py::test_families_are_drawn_not_concepts",
    ),
    Bug(
        "'centered' that isn't",
        f"{SCRIPTS}/scores.py",
        "for ranks, _ in teacher_ranks(rows, test, center)]",
        "for ranks, _ in teacher_ranks(rows, test, False)]",
        f"{QUICKSTART}/test_quickstart_report.py::test_centered_is_after_subtracting_each_sides_mean",
    ),
    Bug(
        "the t test over runs one-sided",
        "llava_integration/compare/statistics.py",
        "return 2 * (1 - t_cdf(abs(estimate) / error, freedom))",
        "return 1 - t_cdf(abs(estimate) / error, freedom)",
        "tests/benchmarks/test_statistics.py::test_the_test_over_runs_is_welchs_where_images_agree",
    ),
    Bug(
        "the t test over runs with 1,000 degrees of freedom",
        "llava_integration/compare/statistics.py",
        "    return combine(parts)\n",
        "    return combine(parts)[0], 1000\n",
        "tests/benchmarks/test_statistics.py::test_the_test_over_runs_is_welchs_where_images_agree",
    ),
    Bug(
        "AdamW without its groups' weight decay",
        "llm2clip_plugin/train/optimizers/adamw.py",
        "torch.optim.AdamW(groups, lr=lr",
        'torch.optim.AdamW([{**group, "weight_decay": 0.0} for group in groups], lr=lr',
        "tests/train/test_optimizers.py::test_adamw_is_the_formula_with_each_groups_rate_and_decay",
    ),
    Bug(
        "AdamW without the run's betas",
        "llm2clip_plugin/train/optimizers/adamw.py",
        "betas=betas, eps=eps, fused",
        "eps=eps, fused",
        "tests/train/test_optimizers.py::test_adamw_is_the_formula_with_each_groups_rate_and_decay",
    ),
    Bug(
        "the heads' fit with decay on vectors",
        "llm2clip_plugin/train/heads.py",
        'if is_vector(p)], "weight_decay": 0.0}',
        'if is_vector(p)], "weight_decay": config.weight_decay}',
        "tests/train/test_model.py::test_heads_decay_matrices_and_no_vectors",
    ),
    Bug(
        "the moving average never updated",
        "llm2clip_plugin/train/loop.py",
        "                average.update()\n",
        "                pass\n",
        "tests/stages/test_tower_run.py::test_the_runs_average_follows_its_weights",
    ),
    Bug(
        "text noise doubled",
        "llm2clip_plugin/vision/adapter.py",
        "x_NW + self.input_noise * (",
        "x_NW + 2 * self.input_noise * (",
        "tests/vision/test_adapter.py::test_input_scale_and_noise",
    ),
    Bug(
        "the raw LLM read without its prompt",
        f"{SCRIPTS}/parts.sh",
        'raw) reading=("${READ[@]}" --layer',
        "raw) reading=(--layer",
        f"{QUICKSTART}/test_quickstart_parts.py::test_the_stronger_controls_are_the_same_training_against_other_embeddings",
    ),
    Bug(
        "random embeddings that know the teacher",
        f"{SCRIPTS}/control_cache.py",
        "            if seed is None:\n",
        "            if seed is None or shard.name:\n",
        f"{QUICKSTART}/test_quickstart_parts.py::test_random_embeddings_are_of_the_text_and_of_the_seed_alone",
    ),
    Bug(
        "removed components that are the smallest",
        "llm2clip_plugin/text/post.py",
        "[directions_WW[:, width - count :].float()",
        "[directions_WW[:, :count].float()",
        "tests/evaluate/test_reading.py::test_removed_components_are_the_largest_of_the_fit",
    ),
    Bug(
        "post-processing that the fingerprint does not know",
        "llm2clip_plugin/text/encoder.py",
        "self.post, self._post_sha256 = open_post(Path(config.post_file), self.width)",
        "self.post, _ = open_post(Path(config.post_file), self.width)",
        "tests/evaluate/test_reading.py::test_the_printed_command_embeds_so_and_the_fingerprint_knows",
    ),
    Bug(
        "prediction intervals three times as wide",
        "scripts/check_claims.py",
        "return t_quantile(1 - level / sides, freedom)",
        "return 3 * t_quantile(1 - level / sides, freedom)",
        "tests/docs/test_claims.py::test_intervals_are_students_and_widen_with_fewer_seeds",
    ),
    Bug(
        "reruns compared by their levels alone",
        "scripts/check_claims.py",
        "if own and own.keys() <= new.keys():",
        "if not own:",
        "tests/docs/test_claims.py::test_a_broken_method_is_flagged",
    ),
)
