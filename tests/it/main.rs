mod house;
mod mock_upstream;
mod mock_worker;
mod router;
mod supervisor;
mod top;
