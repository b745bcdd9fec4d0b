"""The foundations part: softmax attention from its first line, and the papers that take the formula apart."""
