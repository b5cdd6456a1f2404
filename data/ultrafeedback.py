"""The paper's data: 10k prompts of UltraFeedback, and the offline pairs on them, from the DICE repository.

    python data/ultrafeedback.py        makes data/uf-10k/prompt.json and data/uf-10k/preference.json

They are the defaults of `--model llama3-8b` and `--model zephyr-7b`. A file is kept only if all its rows can
be read. DICE_DATA_URL names another place to fetch the two from, a mirror for instance."""
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # needed as a script
from data import hub, jsonl, options  # noqa: E402
from data.files import InputError, one_at_a_time  # noqa: E402

SOURCE = "https://raw.githubusercontent.com/sail-sg/dice/main/data/UF-10k-subset"
FILES = {"prompt.json": jsonl.read_prompts, "preference.json": jsonl.read_preferences}
DIRECTORY = Path(__file__).resolve().parent / "uf-10k"

def prepare(directory, source):
    """Download the files that are missing. Returns what there is, as a text."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(directory / ".lock"):
            for name, read in FILES.items():
                if not (directory / name).exists():
                    scratch = directory / f".{name}"
                    hub.download(f"{source}/{name}", scratch)
                    read(scratch)  # InputError for a row that is not in the right form
                    scratch.rename(directory / name)
        prompts, pairs = (read(directory / name) for name, read in FILES.items())
    except (OSError, InputError) as error:
        raise InputError(f"{error}; try again, or put {' and '.join(FILES)} of {source} into {directory} "
                         "by hand") from None
    return f"{directory}: {len(prompts)} prompts and {len(pairs)} pairs"

@options.command("ultrafeedback.py")
def main(argv=None):
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args(argv)
    print(prepare(DIRECTORY, hub.address("DICE_DATA_URL", SOURCE)))

if __name__ == "__main__":
    sys.exit(main())
