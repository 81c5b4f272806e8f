"""The run report: one HTML file that shows what a job did and what it answered."""
