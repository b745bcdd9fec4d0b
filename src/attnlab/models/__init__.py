"""Models that chapters take apart: pretrained ones through one loader, and small random ones for exact tests."""
