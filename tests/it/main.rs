mod house;
mod mock_upstream;
mod mock_worker;
mod plan;
mod router;
mod supervisor;
mod top;
mod worker;
