"""Which cases of a test `make test` takes where many repeat one property: the rest are `make test-thorough`'s.

By the test, the cases that stay; none: all of it is thorough. What is not named here is taken whole. What is left out
repeats what stays on another mesh, for another kind or family, or at another moment of a kill, or takes long beside
what it shows. A case that a test has not fails test_layout.py.
"""

STAY: dict[str, tuple[str, ...]] = {
    # ---- make test ----
    "tests/test_experiments.py::test_trains_when_shrunk": ("colab", "k2_1b", "k2_v2_70b", "smoke_dpo"),
    "tests/test_sharding.py::test_first_ten_steps_are_the_same_on_every_mesh": (
        "replica 2 x fsdp 2 x tensor 2-2",
        "fsdp 2 x context 2 x tensor 2-1",
        "fsdp 8-1",
    ),
    "tests/test_pipeline.py::test_losses_and_every_gradient_are_those_without_a_pipeline": (
        "2 stages 4 times",
        "rows shared",
    ),
    "tests/test_hf_parity.py::test_logits_are_equal": tuple(
        f"{model}-{way}"
        for model in ("GQA", "one kv head", "all of it", "mistral 1", "qwen2 0", "qwen3 7", "olmo2 7")
        for way in ("imported", "exported")
    ),
    "tests/test_products.py::test_steps_are_the_same_on_meshes": (
        "float8-fsdp 2 x context 2 x tensor 2",
        "int8-replica 2 x fsdp 2 x tensor 2",
    ),
    "tests/test_products.py::test_a_run_resumes_bit_for_bit_and_is_exported_as_it_is": ("float8",),
    "tests/test_products.py::test_remat_keeps_what_it_names": ("int8",),
    "tests/test_weights.py::test_gradients_are_the_scans": (
        "overrides0-bfloat16-2",
        "overrides1-float32-1",
        "overrides2-float32-2",
    ),
    "tests/test_dpo.py::test_the_loss_is_that_of_each_pair_alone": ("next",),
    "tests/test_dpo.py::test_every_mesh_gives_the_loss_and_gradients_of_one_device": ("pipeline",),
    "tests/test_families.py::test_losses_and_every_gradient_are_those_of_one_device": (
        "{'stage': 2, 'fsdp': 2, 'tensor': 2}",
    ),
    "tests/test_families.py::test_generation_is_the_model_again_and_again": ("{'fsdp': 1, 'tensor': 2}-two",),
    "tests/test_context.py::test_values_and_gradients_are_those_of_one_device": (
        "{'context': 4}-documents",
        "{'replica': 2, 'context': 2, 'tensor': 2}-row",
    ),
    "tests/test_context.py::test_the_step_gathers_no_hidden_states": ("fewer",),
    "tests/test_remedies.py::test_remedies_are_the_same_on_two_meshes": ("{'optimizer.qk_clip': 0.01}",),
    "tests/test_remedies.py::test_masked_rows_are_as_if_they_were_not_there": ("4",),
    "tests/test_optimizers.py::test_a_step_that_is_not_finite_leaves_every_bit_of_the_state": ("muon",),
    "tests/test_optimizer.py::test_accumulation_is_one_big_batch": ("True",),
    "tests/test_side_files.py::test_training_and_forks_keep_all_that_an_answer_needs": ("no bos",),
    "tests/test_side_files.py::test_transformers_renders_encodes_and_answers_the_same": ("bos",),
    "tests/test_generate.py::test_greedy_tokens_are_those_of_a_cacheless_forward": ("grouped", "masked", "rope_scaled"),
    "tests/test_generate.py::test_a_sharded_model_gives_the_same_tokens": ("masked",),
    "tests/test_flash_attention.py::test_values_and_gradients_are_the_references": (
        "300-4-2-64-sizes0-True",
        "1-1-1-128-sizes1-False",
        "385-2-2-256-sizes3-True",
        "600-2-1-64-sizes4-False",
    ),
    "tests/test_flash_attention_gpu.py::test_values_and_gradients_are_the_references": (
        "200-4-2-64-sizes0-True",
        "1-1-1-128-sizes1-False",
        "129-2-2-256-sizes2-True",
        "200-2-1-96-sizes3-False",
    ),
    "tests/test_verify_release.py::test_other_types_and_sizes_are_a_line": (
        "release.json",
        "data/chunks.json",
        "run/checkpoints/20/meta/meta.json",
        "run/journal.jsonl",
        "run/branches/01/ledger/chunk-00002.jsonl",
    ),
    "tests/test_harness.py::test_scores_are_those_of_a_plain_forward_pass_on_any_mesh": ("sizes2-100000",),
    "tests/test_eval_chat.py::test_requests_and_numbers_are_the_harness_own": (
        "llama-3-choices-chat0",
        "llama-3-begun-chat2",
        "llama-3-answers-chat4",
        "chatml-choices-chat1",
        "chatml-answers-chat3",
    ),
    "tests/test_sft.py::test_the_loss_is_that_of_each_conversation_alone": ("True-next", "False-inside"),
    "tests/test_sft.py::test_microbatches_of_unequal_counts_are_one_big_batch": ("4",),
    "tests/test_conversation.py::test_turns_have_transformers_ids_and_answers_and_little_is_computed_twice": (
        "llama-3",
    ),
    "tests/test_convert_to_hf.py::test_transformers_loads_it_and_computes_the_same": (
        "GQA, RoPE scaling",
        "tied, one kv head, head_dim above dim / heads",
    ),
    "tests/faults/test_drift.py::test_another_mesh_goes_on_within_rounding": ("sizes0-20",),
    "tests/faults/test_drift.py::test_one_device_goes_on_within_rounding": (),
    "tests/test_build.py::test_workers_change_no_byte": ("2",),
    "tests/test_dpo_run.py::test_on_one_device_the_same_run_within_rounding": (),
    "tests/test_eval_identity.py::test_a_suites_choices_are_the_tasks_own_where_they_say_so": (),
    "tests/test_start.py::test_the_first_state_has_the_bits_that_the_usual_optimisation_gives": (),
    "tests/test_optimizers.py::test_an_average_begins_where_it_is_turned_on_and_is_dropped_where_off": (),
    "tests/test_optimizers.py::test_text_is_generated_from_either": (),
    "tests/test_optimizers.py::test_eight_steps_are_those_of_optax": ("muon", "lion"),
    "tests/test_sft_run.py::test_a_meshs_shape_changes_no_row": (),
    "tests/test_sft.py::test_every_mesh_gives_the_loss_and_gradients_of_one_device": ("pipeline in turns",),
    "tests/test_verify_release.py::test_flipped_bytes_are_a_line": ("data/*.parquet", "exports/step20*/*.safetensors"),
    "tests/test_gpu_suite.py::test_a_section_that_fails_is_named_and_the_others_run": (),
    "tests/test_kept_row.py::test_a_sharded_model_keeps_its_row_too": (),
    "tests/test_read_tables.py::test_the_python_installation_gives_its_documents": (),
    "tests/test_dedup_parts.py::test_a_node_with_a_million_edges_takes_little_memory": (),
    "tests/test_series.py::test_attentions_logits_are_the_same_on_every_mesh": (
        "{'stage': 2, 'context': 2, 'tensor': 2}",
    ),
    # ---- make test-processes ----
    "tests/faults/test_buckets.py::test_a_second_trainer_waits_its_turn": (),
    "tests/faults/test_buckets.py::test_a_roll_back": (),
    "tests/faults/test_buckets.py::test_a_kill_while_a_branchs_checkpoints_are_copied": (),
    "tests/faults/test_ladder.py::test_a_kill_in_a_roll_back_leaves_the_old_or_the_new": (
        "False-2",
        "False-5",
        "True-3",
        "True-6",
    ),
    "tests/faults/test_ladder.py::test_a_spike_that_cannot_be_explained_is_gone_around_all_the_same": (),
    "tests/faults/test_processes.py::test_a_kill_of_one_while_both_save": ("1",),
    "tests/faults/test_processes.py::test_whoever_fails_ends_both_soon_and_says_why": (
        "loader-1",
        "store-0",
        "ledger-0",
        "save-1",
        "report-0",
        "bug-1",
    ),
    "tests/faults/test_processes.py::test_whoever_hangs_in_the_loop_ends_both": ("loader-1-data", "ledger-0-step"),
    "tests/faults/test_processes.py::test_whoever_hangs_ends_both": ("lock-0", "restore-0"),
    "tests/faults/test_processes.py::test_whoever_raises_at_a_resume_ends_both": ("restore-1",),
    "tests/faults/test_processes.py::test_whoever_dies_at_a_resume_ends_the_other": ("lock-0",),
    "tests/faults/test_processes.py::test_a_dead_process_ends_the_other": ("1",),
    "tests/faults/test_processes.py::test_the_report_is_made_where_the_run_was": ("mesh1",),
    "tests/faults/test_signals.py::test_a_signal_before_the_first_step_ends_it_soon": ("data-15", "compile-15"),
    "tests/faults/test_signals.py::test_ctrl_c_and_a_closed_terminal_save": ("1",),
    "tests/faults/test_signals.py::test_a_signal_to_one_where_nothing_is_lost_ends_both": ("compile-1",),
    "tests/faults/test_storage.py::test_kill_while_moments_are_taken_away": ("within",),
    "tests/test_sft_run.py::test_two_processes_that_are_killed_are_one_that_was_not": (),  # as test_dpo_run.py's
    "tests/test_gpu_suite.py::test_every_section_runs_and_its_figures_are_in_the_table_and_the_json": (),
    "tests/test_spikes_bench.py::test_what_is_planted_is_found_and_a_nan_costs_one_step": (),
    "tests/test_ray.py::test_ray_changes_no_byte": (),
    "tests/test_build.py::test_kills_at_any_moment_change_no_byte": ("2",),
    "tests/test_dealing.py::test_stores_do_not_depend_on_the_number_of_tasks_nor_on_parts": (
        "0-options0",
        "0-options3",
    ),
    "tests/test_resume.py::test_a_changed_recipe_in_an_old_folder_gives_what_a_fresh_one_gets": (
        "repeats",
        "tokenizer",
        "lines of one subset more",
        "near",
        "priority",
        "a rule of one that is cut",
        "another limit",
        "one subset more before others",
        "a file less",
        "a file written again, as large as it was",
    ),
    "tests/test_resume.py::test_whatever_is_done_again_gives_the_same": (
        "clean/books-again2",
        "shared-again4",
        "stores-again7",
    ),
}
