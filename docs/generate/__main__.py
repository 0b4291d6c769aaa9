"""``python -m docs.generate``: write every generated page and figure of the documentation."""

from docs.generate.everything import ROOT, documents


def main() -> None:
    """Write the files that differ and print their names."""
    for name, text in documents().items():
        path = ROOT / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
