"""TxT360's recipe (LLM360, 2024): 99 Common Crawl dumps and curated sets, deduplicated against each other.

    python tools/prepare_data.py --config=experiments/data/txt360.py --out=data/txt360 --executor=slurm --workers=4000

As published (k2-facts 4.6): trafilatura, fastText's languages at 0.65, RefinedWeb's line rules, Gopher's and C4's
filters, NFC, e-mail and IP addresses removed, exact and near deduplication of everything at once: 13-grams, 9 bands of
13 of MinHash, Jaccard 0.8. Of duplicates the curated copy stays, then that of the newest dump, and knows where the
others stood. Upsampling by copies is one experiment of theirs: 3 for 2 to 5 copies, 5 to 100, 8 to 1000, 10 above.
Our choices: characters for n-grams (SlimPajama's, which TxT360 says it follows), exact hashes, not Bloom filters,
phone numbers removed as well, but nothing that is a number where numbers are the matter. Cost: see the README.
Curated sets: put them under data/raw as JSON lines.
"""

from ml_collections import ConfigDict

from k2jax.prepare.recipe import PII, base, subset

CURATED = (
    "arxiv", "s2orc", "pubmed-central", "pubmed-abstracts", "wikipedia", "stackexchange", "freelaw", "dm-math",
    "uspto", "pg19", "europarl", "ubuntu-irc", "hackernews", "phil-papers",
)  # fmt: skip
# Numbers of mathematics, and phones among code, are what the rules get wrong; of authors, papers have the e-mail.
PII_OF = {"dm-math": (), "arxiv": ("email",), "s2orc": ("email",), "stackexchange": ("email", "ipv6", "ipv4")}
UPSAMPLE = ((2, 3), (6, 5), (101, 8), (1001, 10))


def get_config() -> ConfigDict:
    c = base()
    c.tokenizer, c.add_k2_tokens = "data/llama/tokenizer.model", True
    for name in CURATED:
        source, pii = f"jsonl:data/raw/{name}/**/*.jsonl*", PII_OF.get(name, PII)
        c.subsets[name] = subset(source, tasks=32, nfc=True, pii=pii, upsample=UPSAMPLE)
    # A file's dump is read off its name.
    c.subsets["common-crawl"] = subset(
        "warc:s3://commoncrawl/crawl-data/CC-MAIN-20[12][0-9]-[0-9][0-9]/segments/*/warc/*.warc.gz",
        dumps=("CC-MAIN-2013-20", "CC-MAIN-2024-30"),
        tasks=100_000,
        priority=1,
        extract=True,
        language_model="data/lid.176.bin",
        languages=("en",),
        url_blocklist="data/blocklist.txt",
        line_rules=True,
        filters=("gopher-repetition", "gopher-quality", "c4"),
        nfc=True,
        pii=PII,
        upsample=UPSAMPLE,
    )
    return c
