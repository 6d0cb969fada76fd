"""When quantities are measured, what is remembered, and what failures do."""
