mod mock_worker;
mod supervisor;
