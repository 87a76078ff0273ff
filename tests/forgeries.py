"""What an able forger may do to a release, a small function each, and the checks that show it.

`shows` names all that fail. After each, files.json is made anew from what is there, unless it says `sealed=False`.
`unseen` are those that nothing inside of a release can show; what shows them stands there, too.
"""

import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction

from forger import Forger

from k2jax.data.manifest import canonical_json, sha256_json, share_out

FORGERIES: dict[str, tuple[Callable[[Forger], object], set[str], bool]] = {}
UNSEEN: dict[str, tuple[Callable[[Forger], object], str]] = {}


def shows(*checks: str, sealed: bool = True) -> Callable:
    def keep(forge: Callable) -> Callable:
        FORGERIES[forge.__name__] = forge, set(checks), sealed
        return forge

    return keep


def unseen(by: str) -> Callable:
    """`by`: what shows it all the same."""

    def keep(forge: Callable) -> Callable:
        UNSEEN[forge.__name__] = forge, by
        return forge

    return keep


# ---- files -----------------------------------------------------------------------------------------------------------


@shows("files", sealed=False)
def a_file_added(f):
    (f.root / "run" / "more.json").write_text("{}")


@shows("files", sealed=False)
def a_file_removed(f):
    (f.root / "exports" / "step24-tokens7168" / "config.json").unlink()


@shows("files", sealed=False)
def a_byte_of_a_card_flipped(f):
    data = bytearray((f.root / "DATA.md").read_bytes())
    data[100] ^= 1
    (f.root / "DATA.md").write_bytes(data)


@shows("files")
def a_link_in_the_place_of_a_file(f):
    (f.root / "DATA.md").unlink()
    (f.root / "DATA.md").symlink_to("/etc/hostname")


@shows("files")
def a_link_in_the_place_of_a_folder(f):
    (f.root / "run" / "held_out").rename(f.root.parent / "elsewhere")
    (f.root / "run" / "held_out").symlink_to(f.root.parent / "elsewhere")


@shows("files", sealed=False)
def a_pipe_among_the_files(f):
    os.mkfifo(f.root / "run" / "pipe")


@shows("files", sealed=False)
def a_path_that_leaves_the_folder(f):
    (f.root.parent / "outside").write_text("x")
    f.json("files.json", lambda v: v["files"].update({"../outside": {"bytes": 1, "sha256": "0" * 64}}))


@shows("signature")
def a_signature_over_another_file(f):
    """The manifest of a release in which one file was another; sealed by hand, as files.json is in it."""
    f.files()
    f.manifest(lambda resources: resources[0].update(digest="0" * 64))


@shows("signature")
def a_signature_over_another_whole(f):
    f.files()
    f.manifest(lambda resources: None, subject="0" * 64)


# ---- epochs and journal ----------------------------------------------------------------------------------------------


@shows("epochs")
def an_epoch_edited(f):
    f.json("run/epochs/0001.json", lambda e: e["config"]["stages"][0].update(lr_peak=1.0))


@shows("checkpoints")
def an_epochs_learning_rate_edited_and_sealed(f):
    f.epoch(1, lambda e: e["config"]["stages"][0].update(lr_peak=1.0))


@shows("checkpoints")
def an_epochs_time_edited_and_sealed(f):
    f.epoch(1, lambda e: e.update(time="2020-01-01T00:00:00+00:00"))


@shows("epochs")
def a_seed_changed_in_the_manifest(f):
    f.epoch(1, lambda e: e["manifest"].update(seed=1))


@shows("journal")
def a_seed_changed_everywhere_in_an_epoch(f):
    """The decisions were taken on another order."""

    def change(epoch):
        epoch["manifest"]["seed"] = epoch["config"]["seed"] = 1

    f.epoch(1, change)


@shows("order")
def a_seed_changed_and_everything_made_anew(f):
    def change(epoch):
        epoch["manifest"]["seed"] = epoch["config"]["seed"] = 1

    f.epoch(1, change)
    f.epoch(2, change)
    f.everything()


@shows("journal")
def an_epoch_that_begins_later(f):
    f.epoch(2, lambda e: e.update(after_step=20))


@shows("journal")
def an_epoch_dropped(f):
    (f.root / "run/epochs/0002.json").unlink()


@shows("epochs")
def an_epoch_dropped_from_the_front(f):
    (f.root / "run/epochs/0001.json").unlink()


@shows("epochs")
def a_share_of_the_mix_edited(f):
    def change(epoch):
        for subset in epoch["manifest"]["stages"][0]["subsets"]:
            subset["rows"] += {"books": -1, "code": 1, "web": 0}[subset["name"]]

    f.epoch(1, change)


@shows("epochs")
def a_store_said_to_be_larger(f):
    f.epoch(1, lambda e: e["manifest"]["stores"]["web"].update(num_tokens=10**6, num_train_tokens=10**6))


@shows("branches", "checkpoints", "rows")
def a_store_said_to_be_another(f):
    """Its root digest in both epochs, and the order's digests of the journal."""

    def change(epoch):
        epoch["manifest"]["stores"]["web"]["root_digest"] = "0" * 64

    f.epoch(1, change)
    f.epoch(2, change)
    f.journal_orders()


@shows("order")
def a_mix_changed_and_everything_made_anew(f):
    """The second epoch's, with the shares that follow."""

    def change(epoch):
        stage = epoch["manifest"]["stages"][0]
        for subset in stage["subsets"]:
            subset["repeats"] = {"books": 9.0}.get(subset["name"], subset["repeats"])
            epoch["config"]["stages"][0]["mix"][subset["name"]] = subset["repeats"]
        weights = {s["name"]: s["windows"] * Fraction(str(s["repeats"])) for s in stage["subsets"]}
        rows = share_out(20 * 8, weights)
        for subset in stage["subsets"]:
            subset["rows"] = rows[subset["name"]]

    f.epoch(2, change)
    f.everything()


@shows("journal")
def a_journal_entry_removed(f):
    f.lines("run/journal.jsonl", lambda lines: lines[1:])


@shows("checkpoints", "release", "rows")
def the_last_journal_entry_removed(f):
    f.lines("run/journal.jsonl", lambda lines: lines[:-1])


@shows("journal")
def a_journal_entry_added(f):
    entry = {"kind": "skip", "positions": [320, 328], "epoch": 2, "at_step": 20, "by": "x", "why": "y"}
    entry |= {"order_before": "0" * 64, "order_after": "0" * 64}
    f.lines("run/journal.jsonl", lambda lines: [*lines, entry])


@shows("journal")
def a_journal_entry_edited(f):
    f.lines("run/journal.jsonl", lambda lines: lines[0].update(positions=[112, 120]))


@shows("order")
def a_journal_entry_edited_and_everything_made_anew(f):
    f.lines("run/journal.jsonl", lambda lines: lines[-1].update(positions=[304, 312]))
    f.everything()


@shows("journal")
def two_journal_entries_changed_round(f):
    f.lines("run/journal.jsonl", lambda lines: [lines[1], lines[0], *lines[2:]])


# ---- ledger ----------------------------------------------------------------------------------------------------------


@shows("ledger", "branches")
def a_loss_edited(f):
    f.row(7, loss="40a00000")


@shows("metrics", "branches")
def a_loss_edited_and_the_chain_made_anew(f):
    f.row(7, loss="40a00000")
    f.rechain()


@shows("metrics")
def a_skipped_update_hidden(f):
    f.row(15, applied=False)
    f.rechain()


@shows("ledger", "branches")
def a_row_dropped(f):
    f.lines("run/ledger/chunk-00001.jsonl", lambda rows: rows[:-1])


@shows("ledger", "branches")
def two_rows_changed_round(f):
    f.lines("run/ledger/chunk-00001.jsonl", lambda rows: [rows[1], rows[0], *rows[2:]])


@shows("batches")
def a_batch_changed_and_the_chain_made_anew(f):
    f.row(15, batch="0" * 64)
    f.rechain()


@shows("batches")
def the_batches_of_two_steps_changed_round(f):
    rows = [json.loads(x) for x in (f.root / "run/ledger/chunk-00002.jsonl").read_bytes().splitlines()]
    batches = {row["step"]: row["batch"] for row in rows}
    f.row(15, batch=batches[16])
    f.row(16, batch=batches[15])
    f.rechain()


@shows("ledger")
def a_record_dropped(f):
    f.lines("run/ledger/records.jsonl", lambda records: [records[0], records[2]])


@shows("checkpoints", "release", "exports", "evaluations", "gallery")
def a_record_dropped_and_the_chain_made_anew(f):
    f.rechain(change=lambda records: [records[0], records[2]])


@shows("checkpoints", "release", "exports", "evaluations", "gallery", "rows")
def the_end_of_the_chain_cut_off(f):
    f.lines("run/ledger/records.jsonl", lambda records: records[:-1])


@shows("checkpoints", "release", "exports", "evaluations", "gallery")
def another_checkpoint_in_a_record(f):
    f.rechain(change=lambda records: records[1].update(checkpoint="0" * 64))


@shows("checkpoints")
def another_order_in_the_record_of_a_checkpoint_left_out(f):
    f.leave_out(20)
    f.rechain(change=lambda records: records[1].update(order="0" * 64))


@shows("checkpoints")
def another_configuration_in_the_record_of_a_checkpoint_left_out(f):
    f.leave_out(20)
    f.rechain(change=lambda records: records[1].update(config="0" * 64))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@shows("checkpoints")
def two_checkpoints_changed_round(f):
    folder = f.root / "run/checkpoints"
    for a, b in (("10", "x"), ("20", "10"), ("x", "20")):
        (folder / a).rename(folder / b)


@shows("arrays", "weights", "release")
def the_weights_of_another_checkpoint(f):
    folder = f.root / "run/checkpoints"
    shutil.rmtree(folder / "20/params")
    shutil.copytree(folder / "24/params", folder / "20/params")


@shows("checkpoints")
def a_digest_of_an_array_edited(f):
    f.json("run/checkpoints/20/meta/meta.json", lambda m: m["digests"].update({"params/embed_VD": 1}))


@shows("checkpoints", "arrays")
def a_digest_of_an_array_edited_and_the_meta_sealed(f):
    f.meta("run/checkpoints/20", lambda m: m["digests"].update({"params/embed_VD": 1}))
    f.table_bytes()


@shows("arrays")
def a_digest_of_an_array_edited_and_all_made_anew(f):
    f.checkpoint(24, lambda m: m["digests"].update({"params/embed_VD": 1}))


@shows("checkpoints")
def another_parent(f):
    f.meta("run/checkpoints/24", lambda m: m["parent"].update(digest="0" * 64))


@shows("checkpoints")
def another_configuration_in_a_checkpoint(f):
    f.meta("run/checkpoints/24", lambda m: m["config"]["optimizer"].update(weight_decay=0.0))


@shows("checkpoints")
def more_tokens_said_to_be_seen(f):
    f.checkpoint(24, lambda m: m.update(tokens_seen=10**12))


@shows("checkpoints")
def another_data_order_in_a_checkpoint(f):
    f.checkpoint(24, lambda m: m["data"].update(journal=0))


@shows("checkpoints")
def another_tokenizer(f):
    f.json("run/tokenizer.json", lambda t: t.update(version="2.0"))


@shows("release")
def a_checkpoint_left_out_of_the_list(f):
    f.json("release.json", lambda r: r["checkpoints"].pop(1))


@shows("release")
def more_tokens_in_the_list(f):
    f.json("release.json", lambda r: r.update(tokens=10**12))


@shows("release")
def a_loss_edited_in_the_table(f):
    text = (f.root / "checkpoints.csv").read_text().splitlines()
    cells = text[2].split(",")
    cells[3] = "1.5"
    (f.root / "checkpoints.csv").write_text("\n".join([*text[:2], ",".join(cells), *text[3:]]) + "\n")


@shows("release")
def optimizer_state_said_to_be_there(f):
    shutil.rmtree(f.root / "run/checkpoints/20/moments")
    f.table_bytes()


@shows("branches")
def a_branch_dropped(f):
    shutil.rmtree(f.root / "run/branches")


@shows("branches")
def the_reason_of_a_roll_back_edited_in_its_branch(f):
    f.json("run/branches/01/branch.json", lambda entry: entry.update(why="no reason"))


@shows("branches")
def a_loss_of_a_branch_edited(f):
    f.lines("run/branches/01/ledger/chunk-00002.jsonl", lambda rows: rows[5].update(loss="40a00000"))


@shows("checkpoints", "weights")
def a_branchs_checkpoint_in_the_run(f):
    folder = f.root / "run/checkpoints/20"
    shutil.rmtree(folder)
    shutil.copytree(f.root / "run/branches/01/checkpoints/20", folder)
    f.table_bytes()


# ---- rows ------------------------------------------------------------------------------------------------------------


@shows("order", "batches")
def two_chunks_changed_round(f):
    paths = [f.root / f"data/chunk_0000{i}.parquet" for i in (0, 1)]
    texts = [path.read_bytes() for path in paths]
    for path, text in zip(paths, reversed(texts), strict=True):
        path.write_bytes(text)
    f.chunks()


@shows("batches")
def one_token_changed(f):
    f.chunk(0, lambda c: c["token_ids"][13].__setitem__(5, (c["token_ids"][13][5] + 1) % 500 + 3))


@shows("batches")
def two_rows_of_a_step_changed_round(f):
    def change(c):
        c["token_ids"][0], c["token_ids"][1] = c["token_ids"][1], c["token_ids"][0]

    f.chunk(0, change)


@shows("order")
def a_window_edited(f):
    f.chunk(0, lambda c: c["window"].__setitem__(9, c["window"][9] + 1))


@shows("order")
def a_subset_edited(f):
    def change(c):
        c["subset"][3] = {"books": "web", "web": "code", "code": "books"}[c["subset"][3]]

    f.chunk(0, change)


@shows("order")
def an_epoch_of_a_row_edited(f):
    f.chunk(2, lambda c: c["epoch"].__setitem__(1, 1))


@shows("rows")
def a_row_dropped_from_a_chunk(f):
    f.chunk(0, lambda c: [column.pop() for column in c.values()])


@shows("documents")
def a_document_dropped(f):
    [row, *_] = [i for i, parts in enumerate(f.documents(0)) if len(parts) > 2]
    f.chunk(0, lambda c: c["documents"][row].pop(1))


@shows("documents")
def two_documents_joined(f):
    [row, *_] = [i for i, parts in enumerate(f.documents(0)) if len(parts) > 2]

    def change(c):
        second = c["documents"][row].pop(1)
        c["documents"][row][0]["stop"] = second["stop"]

    f.chunk(0, change)


@shows("documents")
def a_document_renamed_in_one_of_its_rows(f):
    seen = {}
    for row, parts in enumerate(f.documents(0)):
        for i, part in enumerate(parts):
            seen.setdefault(part["id"], []).append((row, i))
    row, i = next(places[-1] for places in seen.values() if len({row for row, _ in places}) > 1)
    f.chunk(0, lambda c: c["documents"][row][i].update(id="0" * 64))


@shows("rows")
def fewer_chunks_listed(f):
    f.json("data/chunks.json", lambda v: v["chunks"].pop())


@shows("rows")
def other_counts_in_the_list_of_chunks(f):
    f.json("data/chunks.json", lambda v: v["chunks"][0].update(token_ids=1))


@shows("rows")
def rows_taken_away(f):
    shutil.rmtree(f.root / "data")


# ---- exports, evaluations, gallery, launches -------------------------------------------------------------------------


@shows("exports")
def an_export_of_another_checkpoint(f):
    f.replace_export("step24-tokens7168", "step20-tokens5120")


@shows("weights")
def an_export_of_other_weights_with_a_certificate(f):
    """All of another checkpoint's export, its certificate naming this one."""
    wanted = json.loads((f.root / "exports/step24-tokens7168/parity.json").read_bytes())["checkpoint"]
    f.replace_export("step24-tokens7168", "step20-tokens5120")
    f.certificate("step24-tokens7168", lambda p: p.update(checkpoint=wanted))


@shows("exports", "weights")
def an_export_with_other_weights(f):
    f.flip_weight("step24-tokens7168")


@shows("weights")
def a_weight_of_an_export_changed_and_its_certificate_sealed(f):
    f.flip_weight("step24-tokens7168")
    f.certificate("step24-tokens7168", f.tensors_again)


@shows("exports")
def a_file_added_to_an_export(f):
    (f.root / "exports/step24-tokens7168/modeling.py").write_text("import os")


@shows("exports")
def a_certificate_edited(f):
    f.json("exports/step24-tokens7168/parity.json", lambda p: p["logits"].update(tolerance=1.0))


@shows("evaluations")
def an_evaluation_moved_to_another_checkpoint(f):
    [path] = (f.root / "run/evals/10").glob("*.json")
    for one in (path, path.with_suffix(".samples.jsonl")):
        one.rename(f.root / "run/evals/24" / one.name)


@shows("evaluations")
def an_evaluation_moved_and_renamed(f):
    """With the other step, and its own checkpoint."""
    [path] = (f.root / "run/evals/10").glob("*.json")
    f.json(path.relative_to(f.root).as_posix(), lambda r: r.update(step=24))
    f.name_evaluation(path)


@shows("evaluations")
def samples_of_an_evaluation_edited(f):
    [path] = (f.root / "run/evals/10").glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"loss"', b'"less"'))


@shows("gallery")
def a_text_of_the_gallery_moved_to_another_checkpoint(f):
    (f.root / "run/gallery/10.json").rename(f.root / "run/gallery/x")
    (f.root / "run/gallery/20.json").rename(f.root / "run/gallery/10.json")
    f.json("run/gallery/10.json", lambda v: v.update(step=10))
    (f.root / "run/gallery/x").unlink()


@shows("launches")
def a_launch_edited(f):
    f.json("run/environment.json", lambda v: v["launches"][0]["devices"].update(count=4096))


@shows("launches")
def a_prediction_made_afterwards(f):
    (f.root / "run/prediction.json").write_text(json.dumps({"format": 1, "loss": {"final": 1.0}}))


@shows("launches")
def a_prediction_made_afterwards_with_its_entry(f):
    """Checkpoints did not know it."""
    values = {"format": 1, "loss": {"final": 5.0687}}
    (f.root / "run/prediction.json").write_text(json.dumps(values))
    entry = {"kind": "predict", "digest": sha256_json(values), "at_step": 0}
    f.lines("run/journal.jsonl", lambda lines: [*lines, entry])


# ---- what nothing inside of a release can show -----------------------------------------------------------------------


@unseen("replay")
def losses_edited_everywhere(f):
    """Ledger, chain, metrics and table, and the branch's chain, which is the same up to there."""
    f.row(15, loss="40a00000")
    f.rechain()
    f.lines("run/metrics/chunk-00002.jsonl", lambda rows: rows[4].update(loss=5.0))


@unseen("replay")
def tokens_of_a_row_changed_with_the_ledger(f):
    """What was read was something else: the rows, their digest, the chain."""
    f.chunk(1, lambda c: c["token_ids"][33].__setitem__(7, (c["token_ids"][33][7] + 1) % 500 + 3))
    f.row(15, batch=f.batch(1, 15))
    f.rechain()


@unseen("replay")
def weights_of_the_last_checkpoint_changed_everywhere(f):
    """Other weights, with the digests that they have, and no export to compare them with: another run's, say."""
    f.drop_export("step24-tokens7168")
    other = json.loads((f.root / "run/checkpoints/20/meta/meta.json").read_bytes())
    for part in ("params", "moments"):
        shutil.rmtree(f.root / "run/checkpoints/24" / part)
        shutil.copytree(f.root / "run/checkpoints/20" / part, f.root / "run/checkpoints/24" / part)
    f.checkpoint(24, lambda m: m.update(digests=other["digests"]))
    f.table_bytes()


@unseen("digest")
def weights_changed_under_the_same_sums(f):
    """Two numbers of an array, so that the array's digest, of 32 bits and no defence, stays what it was."""
    f.drop_export("step24-tokens7168")
    f.same_sum("run/checkpoints/24", "params/embed_VD")
    f.table_bytes()


@unseen("digest")
def a_store_said_to_be_another_and_everything_made_anew(f):
    """Who has the store sees it, too: its root digest is of its content."""

    def change(epoch):
        epoch["manifest"]["stores"]["web"]["root_digest"] = "0" * 64

    f.epoch(1, change)
    f.epoch(2, change)
    f.everything()
    f.json("data/chunks.json", lambda listed: listed["subsets"].update(web="0" * 64))


@unseen("digest")
def rows_taken_away_and_digests_in_their_place(f):
    """As if no more had been released; the verifier says that no row was compared."""
    shutil.rmtree(f.root / "data")
    (f.root / "data").mkdir()
    rows = [
        json.loads(x) for p in sorted((f.root / "run/ledger").glob("c*")) for x in p.read_bytes().splitlines()
    ]
    text = b"".join(canonical_json({"step": row["step"], "batch": row["batch"]}) + b"\n" for row in rows)
    (f.root / "data/digests.jsonl").write_bytes(text)
    f.json("release.json", lambda r: r.update(data="digests"))


@unseen("digest")
def a_decision_without_consequence_edited(f):
    """It put off rows of a segment that the next manifest laid out anew: what was read is the same."""
    f.lines("run/journal.jsonl", lambda lines: lines[0].update(positions=[112, 120]))
    f.everything()


@unseen("digest")
def a_score_edited(f):
    [path] = (f.root / "run/evals/10").glob("*.json")
    f.json(path.relative_to(f.root).as_posix(), lambda r: r["metrics"]["total"].update(loss=0.5))


@unseen("digest")
def a_text_of_the_gallery_edited(f):
    f.json(
        "run/gallery/10.json", lambda v: [e[0].update(text="of genius") for e in v["checkpoints"].values()]
    )


@unseen("digest")
def a_document_renamed_in_all_of_its_rows(f):
    first = f.documents(0)[0][0]["id"]

    def change(c):
        for part in [part for parts in c["documents"] for part in parts if part["id"] == first]:
            part["id"] = "0" * 64

    for number in range(3):
        f.chunk(number, change)


@unseen("digest")
def a_word_in_the_journal_edited(f):
    f.lines("run/journal.jsonl", lambda lines: lines[-1].update(why="all was well"))


@unseen("digest")
def launches_edited_and_sealed(f):
    def change(values):
        values["launches"][0]["devices"]["count"] = 4096
        values["sha256"] = sha256_json(values["launches"])

    f.json("run/environment.json", change)


@unseen("digest")
def a_held_out_loss_edited(f):
    f.lines("run/held_out/chunk-00001.jsonl", lambda rows: rows[0].update({"loss/books": 0.1}))


@unseen("digest")
def a_prediction_made_afterwards_that_all_checkpoints_know(f):
    """Its entry is the first, and every checkpoint counts one more."""
    values = {"format": 1, "loss": {"final": 5.0687}}
    (f.root / "run/prediction.json").write_text(json.dumps(values))
    entry = {"kind": "predict", "digest": sha256_json(values), "at_step": 0}
    f.lines("run/journal.jsonl", lambda lines: [entry, *lines])
    for path in f.root.glob("run/**/checkpoints/*"):
        f.meta(
            path.relative_to(f.root).as_posix(), lambda m: m["data"].update(journal=m["data"]["journal"] + 1)
        )
    f.everything()
