"""The vocabulary in which an operator is described: rows, and what is made from them. No operator in here."""
