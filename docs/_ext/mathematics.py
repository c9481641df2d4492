"""Converts the plain-text recursions of docstrings to LaTeX.

    x_{t+1} = x_t - eta 1/W sum_i grad f_i(x_t)     becomes
    x_{t+1} = x_{t} - \\eta\\, \\tfrac{1}{W} \\sum_{i} \\nabla f_{i}(x_{t})

The conversion works token by token, keeps the order of the tokens and adds no meaning. Words of two
or more letters are set upright.
"""

import re

_GREEK = (
  *("alpha", "beta", "gamma", "delta", "epsilon", "eta", "theta", "lambda", "mu", "nu", "xi"),
  *("pi", "rho", "sigma", "tau", "phi", "omega", "Delta", "Phi"),
)
_WORDS = {
  **{name: f"\\{name}" for name in _GREEK},
  **{name: f"\\{name}" for name in ("min", "max", "cos", "log")},
  "eps": "\\epsilon",
  "lam": "\\lambda",
  "log2": "\\log_2",
  "grad": "\\nabla ",
  "argmin": "\\operatorname{arg\\,min}",
  "not in": "\\notin",
  "E": "\\mathbb{E}",
  "b1": "b_1",
  "b2": "b_2",
}
_SYMBOLS = {
  "||": "\\|",
  "<-": "\\leftarrow",
  "<=": "\\le",
  ">=": "\\ge",
  "+-": "\\pm",
  "...": "\\dots",
  " | ": "\\mid ",
  "{": "\\{",
  "}": "\\}",
}
# Parameters whose names have two parts.
_NAMES = ("burn_in", "clip_norm", "Walsh-Hadamard", "-th", "'s")
_TOKEN = re.compile(
  r"not in\b|burn_in|clip_norm|Walsh-Hadamard|-th\b|'s\b|\"\w+\""
  r"|[A-Za-z]+[0-9]?(?![0-9])|\d+(?:\.\d+)?|\|\||<-|<=|>=|\+-|=:|\.\.\.| \| |\s+|."
)
_OPERATORS = ("=", "+", "-", "/", "<", ">", "<-", "<=", ">=", "+-", "=:", ":")


def latex(block: str) -> str:
  """Converts a block of one or more lines to a displayed, left-aligned LaTeX array.

  Args:
    block: lines of plain text; the indentation of continuation lines is kept.
  """
  lines = [line for line in block.splitlines() if line.strip()]
  least = min(len(line) - len(line.lstrip()) for line in lines)
  rows = [_row(line[least:]) for line in lines]
  if len(rows) == 1:
    return rows[0]
  return "\\begin{array}{l}\n" + " \\\\[0.35em]\n".join(rows) + "\n\\end{array}"


def _row(line: str) -> str:
  text = line.lstrip()
  indent = "\\quad" * (-(-(len(line) - len(text)) // 4))
  columns = re.split(r"\s{3,}(?!=)", text.rstrip())
  return " ".join([indent, " \\qquad ".join(map(inline, columns))]).strip()


def inline(text: str) -> str:
  """Converts one expression to LaTeX."""
  return _Reader(text).all()


class _Reader:
  """Reads an expression from left to right."""

  def __init__(self, text: str):
    text = re.sub(r"(?<![\w)+}-])(1|alpha|rho|W)/(2|W)(?![\w^(])", r"@frac(\1;\2)", text)
    self.tokens = re.findall(r"@frac\([^)]*\)|" + _TOKEN.pattern, text)
    self.place = 0

  def all(self) -> str:
    return self.until(())

  def until(self, closing: tuple[str, ...]) -> str:
    """Reads everything up to a closing token, which is consumed."""
    parts: list[str] = []
    while self.place < len(self.tokens):
      token = self.take()
      if token in closing:
        break
      if token.isspace():
        parts.append(self.space(parts))
      elif token in "_^":
        parts.append(self.script(token, parts))
      else:
        parts.append(self.one(token))
    return "".join(parts)

  def take(self) -> str:
    self.place += 1
    return self.tokens[self.place - 1]

  def peek(self, ahead: int = 0) -> str:
    place = self.place + ahead
    return self.tokens[place] if 0 <= place < len(self.tokens) else ""

  def space(self, parts: list[str]) -> str:
    """Returns a thin space between factors, or a wide space next to a word."""
    before, after = self.peek(-2), self.peek()
    if before in _OPERATORS or after in _OPERATORS:
      return " "
    if _is_text(before) or _is_text(after):
      return "\\ "
    if re.fullmatch(r"[\w)\]}']+", before) and re.fullmatch(r"[\w(\[]+|@frac.*", after):
      return "\\,"
    return " "

  def one(self, token: str) -> str:
    if token.startswith("@frac"):
      above, below = token[6:-1].split(";")
      return f"\\tfrac{{{_WORDS.get(above, above)}}}{{{_WORDS.get(below, below)}}}"
    if token == "sum" and self.peek() == "_":
      return "\\sum"
    if token == "in" and not _in_text(self):
      return "\\in"
    if token == "sqrt" and self.peek() == "(":
      self.take()
      return f"\\sqrt{{{self.until((')',))}}}"
    if token in ("floor", "ceil") and self.peek() == "(":
      self.take()
      return f"\\l{token} {self.until((')',))}\\r{token} "
    if token == "(":
      return f"({self.until((')',))})"
    if token == "+" and self.peek(-2).isalnum() and self.peek()[:1] in ("", " ", ",", ")"):
      return "^{+}"
    if token == "*":
      return "^{*}"
    if token in _NAMES or token.startswith('"'):
      return f"\\text{{{_plain(token)}}}"
    if token in ("xhat", "x") and (token == "xhat" or self.hat()):
      return "\\hat{x}"
    if token == "r" and self.hat():
      return "\\hat{r}"
    if token in _WORDS:
      return _WORDS[token]
    if token in _SYMBOLS:
      return _SYMBOLS[token]
    if token in "%#&$":
      return f"\\{token}"
    upright = _is_text(token) or token in ("in", "sum", "floor", "ceil")
    return f"\\mathrm{{{token}}}" if upright else token

  def hat(self) -> bool:
    """Consumes `_hat`, as in x_hat."""
    if self.peek() == "_" and self.peek(1) == "hat":
      self.place += 2
      return True
    return False

  def script(self, mark: str, parts: list[str]) -> str:
    """Reads a subscript or superscript; a second subscript joins the first."""
    body = self.body(mark)
    if mark == "_" and parts and parts[-1].startswith("_{"):
      return parts.pop()[:-1] + "," + body + "}"
    return f"{mark}{{{body}}}"

  def body(self, mark: str) -> str:
    token = self.take()
    if token == "{":
      return self.until(("}",))
    if token == "(":
      inside = self.until((")",))
      return inside if mark == "^" else f"({inside})"
    if token == "-":
      rest = self.take()
      over = "/" + self.tokens[self.place + 1] if self.peek() == "/" else ""
      self.place += 2 if over else 0
      return f"-{rest}{over}"
    if mark == "^" and token in ("floor", "ceil", "min") and self.peek() == "(":
      if token == "min":
        self.take()
        return f"\\min({self.until((')',))})"
      return self.one(token)
    if mark == "_" and len(token) == 2 and token.isalpha():
      return token  # two indices
    if mark == "_" and token[:3] == "tau" and token != "tau":
      return token
    if self.peek() == "*":
      self.take()
      return f"{token}^{{*}}"
    return self.one(token)


def _in_text(reader: _Reader) -> bool:
  """Whether the word "in" that was just read is English, not the sign of membership."""
  return reader.peek(-3) == "is" or reader.peek(1) in ("the", "place")


def _is_text(token: str) -> bool:
  """Whether a token is a word, set upright."""
  plain = token[:2].isalpha() and len(token) > 1 and token not in _WORDS
  return (plain and token not in ("sum", "sqrt", "xhat", "in", "floor", "ceil")) or (
    token in _NAMES or token.startswith('"')
  )


def _plain(token: str) -> str:
  return token.strip('"').replace("_", "\\_")
