"""Typeset the paper, reproducibly: ``python typeset.py build/paper.pdf``."""

import sys
from pathlib import Path

try:
    import typst
except ImportError:
    sys.exit("the paper is set by Typst, which is not installed: pip install --group paper")

HERE = Path(__file__).parent

if __name__ == "__main__":
    compiler = typst.Compiler(HERE / "paper.typ", root=HERE, font_paths=typst.Fonts(False))
    try:
        compiler.compile(output=Path(sys.argv[1]), timestamp=0)
    except typst.TypstError as error:
        sys.exit(f"{error.message}\n{error.diagnostic}")
